r"""Fetches 30 s previews of the Million Song Dataset's songs from 7digital. Run it again to go on.

export MUSICGENRE_7DIGITAL_KEY=... MUSICGENRE_7DIGITAL_SECRET=...
python experiments/fetch_previews.py --root=MillionSongSubset

The keys are read from the environment only. At most 4,000 requests are made within 24 hours; the run then ends with exit code 3
and says when to go on.
"""

import sys

from absl import flags

from musicgenre.cli import app
from musicgenre.datasets.fetch import previews

_ROOT = flags.DEFINE_string(
    "root", None, "Folder with the .h5 files, or one file of many songs.", required=True
)
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "Songs to ask for in this run at most; 0 is all.", lower_bound=0
)
_PER_DAY = flags.DEFINE_integer(
    "per_day", previews.REQUESTS_PER_DAY, "Requests within 24 hours, retries too.", lower_bound=1
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only say what would be asked for; needs no keys and writes nothing."
)
_RETRY_MISSING = flags.DEFINE_bool(
    "retry_missing", False, "Ask again for songs that were not found."
)
_LEDGER = flags.DEFINE_string(
    "ledger", "", "List of all requests of a key; <root>/previews/requests.jsonl if empty."
)
_COUNTRY = flags.DEFINE_string(
    "country", "", "ISO code of 7digital's shop, such as GB; the account's own if empty."
)
_BASE_URL = flags.DEFINE_string(
    "base_url", previews.BASE_URL, "Address that the track id is added to."
)
_TIMEOUT = flags.DEFINE_float(
    "timeout", 30.0, "Seconds without a byte after which a request is given up.", lower_bound=0.1
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")


def main() -> int:
    """Fetches, prints what was found, and returns 3 where running again can get more."""
    keys = None if _DRY_RUN.value else previews.keys_from_environment()
    wanted = previews.wanted_songs(_ROOT.value)
    for entry in wanted.skipped:
        print(f"skipped {entry.path}: {entry.reason}", file=sys.stderr)
    options = {
        "ledger": _LEDGER.value,
        "per_day": _PER_DAY.value,
        "limit": _LIMIT.value,
        "retry_missing": _RETRY_MISSING.value,
    }
    if keys is None:
        print("\n".join(previews.plan_lines(_ROOT.value, wanted.numbers, **options)))
        return 0
    summary = previews.fetch_previews(
        _ROOT.value,
        wanted.numbers,
        keys,
        base_url=_BASE_URL.value,
        country=_COUNTRY.value,
        timeout=_TIMEOUT.value,
        progress=_PROGRESS.value,
        **options,
    )
    print("\n".join(summary.lines()))
    return app.PARTIAL if summary.incomplete else 0


if __name__ == "__main__":
    app.run(main)
