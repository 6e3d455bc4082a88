"""Music genre classification and tagging with convolutional networks in JAX and Flax."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger

__version__ = "0.2.0.dev0"
__all__ = ["Tagger", "__version__"]

# The wheel has `configs` and `experiments` as subpackages; a clone, in the parent folder.
if not (Path(__file__).parent / "configs").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))


def __getattr__(name: str) -> Any:
    """Loads `Tagger`, and JAX with it, on first use."""
    if name == "Tagger":
        from musicgenre.inference.tagger import Tagger

        return Tagger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
