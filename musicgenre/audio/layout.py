"""How clips of any length become arrays of one shape."""

import dataclasses

import numpy as np

from musicgenre.audio.features import FeatureSpec
from musicgenre.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipLayout:
    """How clips of any length become arrays of one shape.

    Attributes:
      frames: frames per clip in the store.
      pad: what fills a shorter clip: "repeat" (the clip again), "silence" (its quietest value) or "zero" (0 dB,
        as in the report).
      excerpt: which part of a longer clip is kept: "start" or "middle".
    """

    frames: int
    pad: str = "repeat"
    excerpt: str = "start"

    def __post_init__(self) -> None:
        """Raises UserError for a value that cannot work, naming the field."""
        if self.frames < 1:
            raise UserError(f"data.frames must be at least 1, not {self.frames}.")
        if self.pad not in ("repeat", "silence", "zero"):
            raise UserError(f"data.pad must be 'repeat', 'silence' or 'zero', not {self.pad!r}.")
        if self.excerpt not in ("start", "middle"):
            raise UserError(f"data.excerpt must be 'start' or 'middle', not {self.excerpt!r}.")

    def cut(self, samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
        """Returns the part of `samples` that fills `frames` frames, or all of a shorter clip."""
        wanted = self.frames * spec.hop_length
        start = max(0, len(samples) - wanted) // 2 if self.excerpt == "middle" else 0
        return samples[start : start + wanted]

    def fit(self, features: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns `[frames, bands]` cut or filled from `[any, bands]`, and how many of its frames are real."""
        length = min(len(features), self.frames)
        features = features[: self.frames]
        if length < self.frames:
            if self.pad == "repeat":
                features = np.take(features, np.arange(self.frames) % length, axis=0)
            else:
                value = 0.0 if self.pad == "zero" else features.min()
                features = np.pad(
                    features, ((0, self.frames - length), (0, 0)), constant_values=value
                )
        return features, length
