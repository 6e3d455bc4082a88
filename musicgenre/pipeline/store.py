"""The spectrogram store: memory-mapped float16 shards and a JSON manifest that says what is in them.

    <store>/manifest.json            the data set's view: ids, labels, splits, groups, where each clip lies
    <store>/shards/00000.npy         float16 [clips, frames, bands]
    <store>/shards/00000.json        what the shard was made from: features, sources, lengths, SHA-256, skips

Shards are written once and never changed. The manifest is written last, so a store without one is unfinished.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.audio.features import FeatureSpec
from musicgenre.errors import UserError
from musicgenre.files import read_json, sha256

SCHEMA = 1
# Stores up to this size have their checksums verified whenever they are opened for training or evaluation.
_ALWAYS_VERIFY_BYTES = 4 * 2**30


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
                features = np.pad(features, ((0, self.frames - length), (0, 0)), constant_values=value)
        return features, length


class Store:
    """A finished store, opened for reading. Shards are mapped on first use, so that it pickles small.

    Attributes:
      path: the store's folder.
      features: the front end that made it.
      layout: frames per clip, padding and excerpt.
      dataset: name, root, protocol, task, whether the audio is synthetic, and what a group is.
      label_names: labels in the order of the model's outputs.
      clip_ids: `[clips]`, sorted; all following arrays are in this order.
      paths: `[clips]` source files.
      labels: a tuple of labels for each clip.
      values: for a regression, float32 `[clips, label_names]`; otherwise None.
      splits: `[clips]` of "train", "valid" or "test".
      groups: artist or track of each clip, or None.
      lengths: int32 `[clips]`, real frames of each clip.
      hashes: `[clips]` SHA-256 of each clip's source (the file, or the array row).
      skipped: one mapping `clip_id`, `path`, `reason` for each clip that could not be used.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.features = FeatureSpec.from_dict(manifest["features"])
        self.layout = ClipLayout(**manifest["layout"])
        self.dataset: dict[str, Any] = manifest["dataset"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self.skipped: list[dict[str, str]] = manifest["skipped"]
        clips = manifest["clips"]
        self.clip_ids = np.array(clips["clip_id"], dtype=object)
        self.paths = np.array(clips["path"], dtype=object)
        self.labels: list[tuple[str, ...]] = [tuple(labels) for labels in clips["labels"]]
        self.values = np.array(clips["values"], np.float32) if "values" in clips else None
        self.splits = np.array(clips["split"])
        self.groups: list[str | None] = clips["group"]
        self.lengths = np.array(clips["length"], np.int32)
        self.hashes = np.array(clips["sha256"], dtype=object)
        self._shard = np.array(clips["shard"], np.int32)
        self._row = np.array(clips["row"], np.int32)
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._maps: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}

    @classmethod
    def open(cls, path: str | Path, verify: bool | None = None) -> "Store":
        """Opens a finished store.

        Args:
          path: the store's folder.
          verify: compare every shard with its SHA-256; None does so for stores up to 4 GiB and otherwise
            compares sizes only.

        Raises:
          UserError: no finished store is there, it has another schema, or a shard is missing or damaged.
        """
        path = Path(path)
        manifest_path = path / "manifest.json"
        if not manifest_path.is_file():
            raise UserError(
                f"{path}: no finished spectrogram store (manifest.json is missing). "
                "Run experiments/prepare.py with the same --config first."
            )
        manifest = read_json(manifest_path, "store manifest")
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else None
            raise UserError(
                f"{manifest_path}: schema {found!r} is not the one that this version reads ({SCHEMA}). "
                "Prepare the store again in another folder."
            )
        try:
            store = cls(path, manifest)
        except (KeyError, TypeError) as error:
            raise UserError(f"{manifest_path}: incomplete manifest ({error}). Run experiments/prepare.py again.") from error
        total = sum(shard["bytes"] for shard in store._shards)
        for shard in store._shards:
            full = verify if verify is not None else total <= _ALWAYS_VERIFY_BYTES
            if problem := shard_problem(path / "shards", shard, full):
                raise UserError(f"{problem} Run experiments/prepare.py again: it rebuilds only that shard.")
        return store

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def task(self) -> str:
        """One of "single_label", "multi_label" and "regression"."""
        return str(self.dataset["task"])

    @property
    def group_name(self) -> str:
        """What a group is, such as "artist" or "track"."""
        return str(self.dataset.get("group_name", "artist"))

    @property
    def bands(self) -> int:
        """Values per frame."""
        return self.features.bands

    def indices(self, split: str) -> np.ndarray:
        """Returns the clips of a split, int64 `[n]`, in order of their ids.

        Raises:
          UserError: the split has no clips; the message lists those that have.
        """
        found = np.flatnonzero(self.splits == split)
        if len(found) == 0:
            there = ", ".join(
                f"{name} ({count})" for name, count in zip(*np.unique(self.splits, return_counts=True), strict=True)
            )
            raise UserError(f"{self.path}: no clips in the split {split!r}. There are: {there}.")
        return found

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Returns class numbers, int32 `[n]`, 0/1 tags or numbers, float32 `[n, labels]`, by the store's task."""
        if self.values is not None:
            return self.values[indices]
        number = {label: i for i, label in enumerate(self.label_names)}
        if self.task == "single_label":
            return np.array([number[self.labels[i][0]] for i in indices], np.int32)
        targets = np.zeros((len(indices), len(self.label_names)), np.float32)
        for position, i in enumerate(indices):
            targets[position, [number[label] for label in self.labels[i]]] = 1.0
        return targets

    def gather(self, indices: np.ndarray, starts: np.ndarray | None = None, frames: int | None = None) -> np.ndarray:
        """Copies clips out of the shards.

        Args:
          indices: clips, `[n]`.
          starts: first frame of each, `[n]`; 0 if None.
          frames: frames of each from there; all if None.

        Returns:
          float16 `[n, frames, bands]`.
        """
        if self._maps is None:
            self._maps = [
                np.load(self.path / "shards" / shard["file"], mmap_mode="r", allow_pickle=False) for shard in self._shards
            ]
        frames = frames or self.layout.frames
        result = np.empty((len(indices), frames, self.bands), np.float16)
        for position, i in enumerate(indices):
            start = 0 if starts is None else starts[position]
            result[position] = self._maps[self._shard[i]][self._row[i], start : start + frames]
        return result


def shard_problem(folder: Path, shard: dict[str, Any], full: bool) -> str:
    """Returns what is wrong with a shard as a sentence that names it, or "" where nothing is.

    Args:
      folder: where the shards lie.
      shard: its record, with `file`, `bytes` and `sha256`.
      full: compare the checksum, not only the size.
    """
    file = folder / shard["file"]
    if not file.is_file():
        return f"{file}: this shard of the store is missing."
    if file.stat().st_size != shard["bytes"]:
        return f"{file}: this shard is damaged ({file.stat().st_size} bytes where {shard['bytes']} were written)."
    if full and sha256(file) != shard["sha256"]:
        return f"{file}: this shard is damaged (its SHA-256 is not the one that was written)."
    return ""
