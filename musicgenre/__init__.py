"""Music genre and tag recognition from sound with convolutional networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger

__version__ = "0.1.0"
__all__ = ["Tagger", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads `Tagger`, and JAX with it, when it is first asked for."""
    if name == "Tagger":
        from musicgenre.inference.tagger import Tagger

        return Tagger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
