"""A trained model in a few lines of Python.

Examples:
  A synthetic song first, so that the examples run anywhere:

  >>> import soundfile
  >>> from musicgenre.datasets.synthetic import STYLES, render_clip
  >>> clip = render_clip(next(iter(STYLES)), seed=0, seconds=60)
  >>> soundfile.write("song.flac", clip, 22050)

  >>> from musicgenre import Tagger
  >>> tagger = Tagger.load("gtzan")  # or a run's folder, or a bundle's file
  >>> len(tagger.labels), tagger.labels[:3]
  (10, ('blues', 'classical', 'country'))

  The most probable label of a file, with its probability; all of them sum to one:

  >>> label, probability = tagger.tag("song.flac", top=1)[0]
  >>> label in tagger.labels and 0.1 <= probability <= 1
  True
  >>> round(sum(tag.probability for tag in tagger.tag("song.flac")), 5)
  1.0

  Many files. One that cannot be used yields the reason, and the others are still tagged:

  >>> files = tagger.tag_files(["song.flac", "gone.mp3"], top=3)
  >>> [(file.path, len(file.tags), file.error) for file in files]
  [('song.flac', 3, ''), ('gone.mp3', 0, 'gone.mp3: no such file.')]

  Labels over time with a window every fifteen seconds, and the file's embedding:

  >>> taggram = tagger.taggram("song.flac", step_seconds=15)
  >>> taggram.probabilities.shape == (len(taggram.starts), 10)
  True
  >>> taggram.starts[:2].round().tolist()
  [0.0, 15.0]
  >>> tagger.embed("song.flac").ndim
  1
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from musicgenre.errors import UserError
from musicgenre.inference.predict import ranked
from musicgenre.inference.windows import (
    FileScores,
    Network,
    WindowScores,
    no_embedding,
    score_files,
)
from musicgenre.runs.model import TrainedModel, load_model

PathLike = str | os.PathLike[str]


class Tag(NamedTuple):
    """A label and its probability (for a regression, an output's name and its value)."""

    label: str
    probability: float


class TaggedFile(NamedTuple):
    """A file with its labels, the most probable first, or with the reason why it has none."""

    path: str
    tags: tuple[Tag, ...]
    error: str = ""


class Tagger:
    """A trained model for sound files of any length. The first file compiles the network.

    Args:
      model: from `musicgenre.runs.model.load_model`.
      min_seconds: shorter files are refused.
    """

    def __init__(self, model: TrainedModel, *, min_seconds: float = 1.0) -> None:
        self.model = model
        self.min_seconds = min_seconds
        self.network = Network(model)

    @classmethod
    def load(cls, source: PathLike, which: str = "last", *, min_seconds: float = 1.0) -> "Tagger":
        """Loads a packaged model by name, a run's folder or a bundle's file.

        Args:
          source: such as "gtzan", "runs/mine" or "mine.safetensors".
          which: checkpoint of a run: "last", "best" or a step.
          min_seconds: shorter files are refused.

        Raises:
          UserError: there is no such model, or it cannot be read.
        """
        return cls(load_model(source, which), min_seconds=min_seconds)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the model's outputs."""
        return self.model.label_names

    def tag(self, path: PathLike, top: int | None = None) -> list[Tag]:
        """Returns a file's labels with their probabilities, the most probable first.

        The probabilities are means over the file; see `musicgenre.inference.windows`. The outputs
        of a regression keep their own order. `top` is the number of labels; None for all.

        Raises:
          UserError: the file cannot be used.
        """
        return list(self.tags(self._one(path), top))

    def tag_files(self, paths: Iterable[PathLike], top: int | None = None) -> Iterator[TaggedFile]:
        """Yields each file with its labels, in order; a file that cannot be used with its error.

        The next files are decoded while the network computes.
        """
        for scores in self.scores(paths):
            yield TaggedFile(scores.path, self.tags(scores, top), scores.error)

    def tags(self, scores: FileScores, top: int | None = None) -> tuple[Tag, ...]:
        """Returns the labels of a file's scores as `tag` does; none after an error."""
        values = scores.probabilities
        if values is None:
            return ()
        order = ranked(values, self.model.task)[:top]
        return tuple(Tag(self.labels[i], float(values[i])) for i in order)

    def taggram(self, path: PathLike, step_seconds: float = 0.0) -> WindowScores:
        """Returns the probabilities over time.

        Args:
          path: a sound file.
          step_seconds: from one window to the next, rounded to whole frames; 0 for consecutive
            windows.

        Raises:
          UserError: the file cannot be used, or the step is longer than a window.
        """
        scores = self._one(path, step=self.step_frames(step_seconds), keep_windows=True)
        assert scores.windows is not None
        return scores.windows

    def embed(self, path: PathLike) -> np.ndarray:
        """Returns a file's embedding, float32 `[d]`: the mean input of the network's last layer.

        The mean over consecutive windows is weighted; see `musicgenre.inference.windows`.

        Raises:
          UserError: the file cannot be used, or the network has no embedding.
        """
        embedding = self._one(path, step=self.model.frames).embedding
        assert embedding is not None
        if not embedding.size:
            raise UserError(no_embedding(self.model))
        return embedding

    def step_frames(self, seconds: float) -> int:
        """Returns a step in frames, at least 1; for 0 seconds, the frames of a window.

        Raises:
          UserError: the step is negative.
        """
        if seconds < 0:
            raise UserError(f"the step must not be negative, but is {seconds:g} s.")
        spec = self.model.features
        frames = max(round(seconds * spec.sample_rate / spec.hop_length), 1)
        return frames if seconds else self.model.frames

    def scores(
        self, paths: Iterable[PathLike], *, step: int = 0, keep_windows: bool = False
    ) -> Iterator[FileScores]:
        """Yields the scores of each file; see `musicgenre.inference.windows.score_files`."""
        options: dict[str, Any] = {"network": self.network, "min_seconds": self.min_seconds}
        return score_files(self.model, paths, step=step, keep_windows=keep_windows, **options)

    def _one(self, path: PathLike, **options: Any) -> FileScores:
        scores = next(self.scores([path], **options))
        if scores.error:
            raise UserError(scores.error)
        return scores
