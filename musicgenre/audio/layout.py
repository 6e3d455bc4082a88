"""How clips of any length become arrays of one shape."""

import dataclasses

import numpy as np

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.errors import UserError

# Relative difference from `frames` hops up to which "spread" covers all of a clip.
_TOLERANCE = 0.025


@dataclasses.dataclass(frozen=True)
class ClipLayout:
    """How clips of any length become arrays of one shape.

    Attributes:
      frames: frames per clip in the store.
      pad: what fills a shorter clip: "repeat" (the clip again), "silence" (its quietest value) or
        "zero" (0 dB, as in the report).
      excerpt: what is kept of a longer clip. "start" and "middle" keep that part of it. "spread"
        computes frames every quarter of a transform and keeps evenly spaced ones, about
        `hop_length` apart; a clip within 2.5 % of `frames` hops is covered to its end. The
        precomputed GTZAN spectrograms were sampled this way.
    """

    frames: int
    pad: str = "repeat"
    excerpt: str = "start"

    def __post_init__(self) -> None:
        """Raises UserError for an invalid value, naming the field."""
        if self.frames < 1:
            raise UserError(f"data.frames must be at least 1, not {self.frames}.")
        choices = {"pad": ("repeat", "silence", "zero"), "excerpt": ("start", "middle", "spread")}
        for field, (one, two, three) in choices.items():
            if (value := getattr(self, field)) not in (one, two, three):
                raise UserError(
                    f"data.{field} must be {one!r}, {two!r} or {three!r}, not {value!r}."
                )

    def features(self, samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
        """Returns features of the kept part of mono samples `[samples]`, float32 `[any, bands]`.

        Raises:
          UserError: the excerpt is "spread" and the features are a waveform.
        """
        if self.excerpt != "spread":
            return compute_features(self.cut(samples, spec), spec)
        if spec.kind == "waveform":
            raise UserError("data.excerpt='spread' needs spectrograms: take 'start' or 'middle'.")
        wanted = self.frames * spec.hop_length
        if len(samples) > (1 + _TOLERANCE) * wanted:
            samples = samples[:wanted]
        hop = min(max(spec.n_fft // 4, 1), spec.hop_length)
        dense = compute_features(samples, dataclasses.replace(spec, hop_length=hop))
        count = self.frames
        if len(samples) < (1 - _TOLERANCE) * wanted:
            count = max(round(len(dense) * hop / spec.hop_length), 1)
        # Half a frame of margin at the end, as when a spectrogram is drawn `count` pixels wide.
        return dense[((np.arange(count) + 0.5) * len(dense) / (count + 0.5)).astype(int)]

    def cut(self, samples: np.ndarray, spec: FeatureSpec) -> np.ndarray:
        """Returns the part of `samples` that fills `frames` frames, or all of a shorter clip."""
        wanted = self.frames * spec.hop_length
        start = max(0, len(samples) - wanted) // 2 if self.excerpt == "middle" else 0
        return samples[start : start + wanted]

    def fit(self, features: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns `[any, bands]` trimmed or padded to `[frames, bands]`, and its real frames."""
        features = features[: self.frames]
        length = len(features)
        if length < self.frames:
            if self.pad == "repeat":
                features = np.take(features, np.arange(self.frames) % length, axis=0)
            else:
                value = 0.0 if self.pad == "zero" else features.min()
                missing = self.frames - length
                features = np.pad(features, ((0, missing), (0, 0)), constant_values=value)
        return features, length
