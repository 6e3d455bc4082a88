r"""Download a data set from its own host and unpack it; resumes.

musicgenre download --dataset=mtat --root=/data/mtat
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import PARTIAL

FLAGS = flags.FlagValues()
_DATASET = flags.DEFINE_enum(
    "dataset", "mtat", ["mtat"], "MagnaTagATune: about 3 GB, and 3 GB more unpacked.", FLAGS
)
_ROOT = flags.DEFINE_string(
    "root", None, "Folder of the data set, created if missing.", FLAGS, required=True
)
_BASE_URL = flags.DEFINE_string("base_url", "", "Another host of the same files.", FLAGS)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.", FLAGS)


def main() -> int:
    """Downloads the data set, prints what is complete and what is broken; returns the exit code."""
    from musicgenre.datasets.fetch.mtat import MTAT_URL, download_mtat

    summary = download_mtat(_ROOT.value, _BASE_URL.value or MTAT_URL, progress=_PROGRESS.value)
    print("\n".join(summary.lines()))
    return 0 if summary.complete else PARTIAL


if __name__ == "__main__":
    app.run(__name__)
