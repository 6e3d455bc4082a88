r"""Download 30 s previews of the Million Song Dataset's songs from 7digital; resumes.

export MUSICGENRE_7DIGITAL_KEY=... MUSICGENRE_7DIGITAL_SECRET=...
musicgenre fetch_previews --root=MillionSongSubset

The keys are read from the environment only. At most 4,000 requests are made within 24 hours; then
the command ends with exit code 3 and says when to run it again.
"""

import sys

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import PARTIAL

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "root", None, "Folder of .h5 files, or one file of many songs.", FLAGS, required=True
)
flags.DEFINE_integer(
    "limit", 0, "Most songs to request in this run; 0 is all.", 0, flag_values=FLAGS
)
flags.DEFINE_integer(
    "per_day", 4000, "Requests within 24 hours, retries included.", 1, flag_values=FLAGS
)
flags.DEFINE_bool("dry_run", False, "List what would be requested; needs no keys.", FLAGS)
flags.DEFINE_bool("retry_missing", False, "Request songs again that were not found.", FLAGS)
flags.DEFINE_string(
    "ledger", "", "Record of requests; <root>/previews/requests.jsonl if empty.", FLAGS
)
flags.DEFINE_string(
    "country", "", "ISO code of the shop, such as GB; the account's if empty.", FLAGS
)
flags.DEFINE_string("base_url", "", "Another address that the track id is added to.", FLAGS)
flags.DEFINE_float(
    "timeout", 30.0, "Seconds without a byte before giving up.", 0.1, flag_values=FLAGS
)
flags.DEFINE_bool("progress", True, "Draw a progress bar.", FLAGS)


def main() -> int:
    """Downloads, prints what was found, and returns 3 if running it again can get more."""
    from musicgenre.datasets.fetch import previews

    keys = None if FLAGS.dry_run else previews.keys_from_environment()
    wanted = previews.wanted_songs(FLAGS.root)
    for entry in wanted.skipped:
        print(f"skipped {entry.path}: {entry.reason}", file=sys.stderr)
    names = ("ledger", "per_day", "limit", "retry_missing")
    options = {name: FLAGS[name].value for name in names}
    if keys is None:
        print("\n".join(previews.plan_lines(FLAGS.root, wanted.numbers, **options)))
        return 0
    options |= {name: FLAGS[name].value for name in ("country", "timeout", "progress")}
    options["base_url"] = FLAGS.base_url or previews.BASE_URL
    summary = previews.fetch_previews(FLAGS.root, wanted.numbers, keys, **options)
    print("\n".join(summary.lines()))
    return PARTIAL if summary.incomplete else 0


if __name__ == "__main__":
    app.run(__name__)
