r"""Fetches a data set from its own host and unpacks it. Run it again to go on where it was stopped.

python experiments/download.py --dataset=mtat --root=/data/mtat
"""

from absl import flags

from musicgenre.cli import app
from musicgenre.datasets.fetch.mtat import MTAT_URL, download_mtat

_DATASET = flags.DEFINE_enum(
    "dataset", "mtat", ["mtat"], "MagnaTagATune: about 3 GB, and 3 GB more unpacked."
)
_ROOT = flags.DEFINE_string(
    "root", None, "Folder of the data set; made where it does not exist.", required=True
)
_BASE_URL = flags.DEFINE_string(
    "base_url", MTAT_URL, "Where its files are, if it has moved or you have a mirror."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.")


def main() -> int:
    """Fetches the data set, prints what is there and what is broken, and returns the exit code."""
    summary = download_mtat(_ROOT.value, _BASE_URL.value, progress=_PROGRESS.value)
    print("\n".join(summary.lines()))
    return 0 if summary.complete else app.PARTIAL


if __name__ == "__main__":
    app.run(main)
