r"""Download a data set from its own host and unpack it; resumes.

musicgenre download --dataset=mtat --root=/data/mtat
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import PARTIAL

FLAGS = flags.FlagValues()
flags.DEFINE_enum(
    "dataset", "mtat", ["mtat"], "MagnaTagATune: 3 GB, and 3 GB more unpacked.", FLAGS
)
flags.DEFINE_string("root", None, "Folder, created if missing.", FLAGS, required=True)
flags.DEFINE_string("base_url", "", "Another host of the same files.", FLAGS)
flags.DEFINE_bool("progress", True, "Draw progress bars.", FLAGS)


def main() -> int:
    """Downloads the data set, prints what is complete and what is broken; returns the exit code."""
    from musicgenre.datasets.fetch.mtat import MTAT_URL, download_mtat

    summary = download_mtat(FLAGS.root, FLAGS.base_url or MTAT_URL, progress=FLAGS.progress)
    print("\n".join(summary.lines()))
    return 0 if summary.complete else PARTIAL


if __name__ == "__main__":
    app.run(__name__)
