"""The spectrogram store: float16 shards, columns over the clips, and a small JSON manifest.

    <store>/manifest.json                 front end, layout, data set, labels, splits, file names
    <store>/clips-1a2b3c4d.safetensors    columns over all clips: ids, paths, labels, splits, rows
    <store>/skipped-1a2b3c4d.jsonl        one line per unusable clip: clip_id, path, reason
    <store>/shards/00000.npy              float16 [clips, frames, bands]
    <store>/shards/00000.json             its features, sources, lengths, SHA-256 and skipped clips

Shards never change once written. The files beside the manifest are named by their content
(SHA-256), and the manifest is written last, so readers see the old or the new store. A store
without a manifest is unfinished.

Opening a store reads the manifest and checks sizes. Columns are read on first use and shards in
place, so opening takes no longer for a million clips (`docs/scaling.md` has numbers).
"""

import functools
import hashlib
import itertools
import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.datasets.base import Clip
from musicgenre.errors import UserError
from musicgenre.files import read_json, replacing, sha256, write_text

SCHEMA = 2
# Schema of a shard's record, which is the same in stores of schema 1.
SHARD_SCHEMA = 1
# Stores up to this size have their checksums verified whenever they are opened.
_ALWAYS_VERIFY_BYTES = 4 * 2**30
# Shards kept open: by default macOS allows 256 files per process, Linux 1,024. A store with no more
# shards than this is memory-mapped.
_OPEN_SHARDS = 128
_AGAIN = "Run musicgenre prepare again"


class Store:
    """A finished store, opened for reading. Columns and shards are read on first use.

    Attributes:
      path: the store's folder.
      features: the front end that made it.
      layout: frames per clip, padding and excerpt.
      dataset: name, root, protocol, task, whether the audio is synthetic, and the meaning of a
        group.
      label_names: labels in the order of the model's outputs.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.features = FeatureSpec.from_dict(manifest["features"])
        self.layout = ClipLayout(**manifest["layout"])
        self.dataset: dict[str, Any] = manifest["dataset"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self._manifest = manifest
        self._split_names = tuple(manifest["splits"])
        self._arrays: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._manifest)

    @classmethod
    def open(cls, path: str | Path, verify: bool | None = None) -> "Store":
        """Opens a finished store.

        Args:
          path: the store's folder.
          verify: compare every shard with its SHA-256; None does so for stores up to 4 GiB and
            compares sizes otherwise. The columns are always compared.

        Raises:
          UserError: no finished store, an unknown schema, or a missing or damaged file.
        """
        path = Path(path)
        file = path / "manifest.json"
        if not file.is_file():
            raise UserError(
                f"{path}: no finished spectrogram store (manifest.json is missing). "
                "Run musicgenre prepare with the same --config first."
            )
        manifest = read_json(file, "store manifest")
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        if found != SCHEMA:
            remedy = "Update musicgenre, or prepare the store again in another folder."
            if found == 1:
                remedy = f"{_AGAIN}: it rewrites this file, computing nothing."
            raise UserError(
                f"{file}: this version reads schema {SCHEMA}, not schema {found!r}. {remedy}"
            )
        try:
            store = cls(path, manifest)
            for record in filter(None, (manifest["clips"], manifest["skipped"])):
                if problem := file_problem(path, record, full=True, what="part"):
                    raise UserError(f"{problem} {_AGAIN}: it rewrites the file, computing nothing.")
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}: incomplete manifest ({error}). {_AGAIN}.") from error
        numbers, sizes, digests = (
            store._column(f"shard_{name}") for name in ("number", "bytes", "sha256")
        )
        records = (
            {"file": f"{number:05d}.npy", "bytes": size, "sha256": digest.tobytes().hex()}
            for number, size, digest in zip(numbers, sizes.tolist(), digests, strict=True)
        )
        if verify is None:
            verify = int(sizes.sum()) <= _ALWAYS_VERIFY_BYTES
        check = functools.partial(file_problem, path / "shards", full=verify)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # For sizes alone, threads cost more than they gain.
            for problem in filter(None, (pool.map if verify else map)(check, records)):
                raise UserError(f"{problem} {_AGAIN}: it rebuilds only that shard.")
        return store

    def __len__(self) -> int:
        return len(self._column("row"))

    @functools.cached_property
    def clip_ids(self) -> np.ndarray:
        """Ids, str `[clips]`, sorted; all other per-clip values are in this order."""
        return np.array(self._text("clip_id"), dtype=object)

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """Source files, str `[clips]`."""
        return np.array(self._text("path"), dtype=object)

    @functools.cached_property
    def labels(self) -> list[tuple[str, ...]]:
        """A tuple of labels for each clip; for many clips `targets` is faster."""
        names = [self.label_names[number] for number in self._column("label").tolist()]
        bounds = itertools.pairwise(self._column("label_bounds").tolist())
        return [tuple(names[start:end]) for start, end in bounds]

    @property
    def values(self) -> np.ndarray | None:
        """For a regression, float32 `[clips, label_names]`; otherwise None."""
        return self._column("values") if self.task == "regression" else None

    @functools.cached_property
    def splits(self) -> np.ndarray:
        """One of "train", "valid" and "test" for each clip, `[clips]`."""
        return np.array(self._split_names)[self._column("split")]

    @functools.cached_property
    def groups(self) -> list[str | None]:
        """The artist or track of each clip, or None."""
        names = [*self._text("group_name"), None]  # -1 is no group
        return [names[number] for number in self._column("group").tolist()]

    @property
    def lengths(self) -> np.ndarray:
        """Real frames of each clip, int32 `[clips]`."""
        return self._column("length")

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """SHA-256 of each clip's source (file or array row), hexadecimal, str `[clips]`."""
        return np.array([row.tobytes().hex() for row in self._column("sha256")], dtype=object)

    @functools.cached_property
    def skipped(self) -> list[dict[str, str]]:
        """A mapping `clip_id`, `path`, `reason` for each unusable clip."""
        record = self._manifest["skipped"]
        text = (self.path / record["file"]).read_text(encoding="utf-8") if record else ""
        return [json.loads(line) for line in text.splitlines()]

    @property
    def task(self) -> str:
        """One of "single_label", "multi_label" and "regression"."""
        return str(self.dataset["task"])

    @property
    def group_name(self) -> str:
        """The meaning of a group, such as "artist" or "track"."""
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
        if split in self._split_names:
            return np.flatnonzero(self._column("split") == self._split_names.index(split))
        known = ", ".join(f"{name} ({count})" for name, count in self._manifest["splits"].items())
        raise UserError(f"{self.path}: no clips in the split {split!r}. There are: {known}.")

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Returns class numbers, int32 `[n]`, or 0/1 tags or numbers, float32 `[n, labels]`."""
        if self.values is not None:
            return self.values[indices]
        numbers, bounds = self._column("label"), self._column("label_bounds")
        first = bounds[indices]
        if self.task == "single_label":
            return numbers[first]
        counts = bounds[indices + 1] - first
        rows = np.repeat(np.arange(len(indices)), counts)
        # The labels of a clip follow each other from `first` on.
        labels = np.arange(len(rows)) + np.repeat(first + counts - np.cumsum(counts), counts)
        targets = np.zeros((len(indices), len(self.label_names)), np.float32)
        targets[rows, numbers[labels]] = 1.0
        return targets

    def gather(
        self, indices: np.ndarray, starts: np.ndarray | None = None, frames: int | None = None
    ) -> np.ndarray:
        """Copies clips out of the shards; thread-safe.

        Args:
          indices: clips, `[n]`.
          starts: first frame of each, `[n]`; 0 if None.
          frames: frames of each from there; all if None.

        Returns:
          float16 `[n, frames, bands]`.

        Raises:
          ValueError: frames outside a clip.
          UserError: a shard is missing or truncated.
        """
        frames, total = frames or self.layout.frames, self.layout.frames
        first = np.zeros(len(indices), np.int64) if starts is None else np.asarray(starts, np.int64)
        low, high = min(listed := first.tolist(), default=0), max(listed, default=0)
        # In the file a clip is followed directly by the next.
        if low < 0 or high + frames > total:
            raise ValueError(f"frames {low} to {high + frames} of clips of {total} frames")
        numbers, begins = self._positions
        result = np.empty((len(indices), frames, self.bands), np.float16)
        if result.size:
            rows = result.view(np.uint8).reshape(len(indices), -1)
            shards: list[Any] = list(map(self._open, numbers[indices].tolist()))
            offsets = (begins[indices] + 2 * self.bands * first).tolist()
            type(shards[0]).read(rows, shards, offsets)
        return result

    @functools.cached_property
    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Each clip's shard number, int32 `[clips]`, and byte offset there, int64 `[clips]`."""
        clip_bytes = 2 * self.bands * self.layout.frames
        clips_per_shard = self._column("shard_rows").astype(np.int64)
        headers = self._column("shard_bytes") - clip_bytes * clips_per_shard  # NumPy's own
        shards, rows = self._column("shard"), self._column("row").astype(np.int64)
        return self._column("shard_number")[shards], headers[shards] + clip_bytes * rows

    @functools.cached_property
    def _open(self) -> "Callable[[int], _MappedShard | _OpenShard]":
        """A function that opens a shard by its number and keeps the last used ones.

        Memory maps are fastest once their pages are cached. With many shards that is rare, and
        reading is faster, adds no pages to this process and limits the number of open files.
        """
        shard = _MappedShard if len(self._column("shard_number")) <= _OPEN_SHARDS else _OpenShard
        return functools.lru_cache(_OPEN_SHARDS)(
            lambda number: shard(f"{self.path}/shards", number)
        )

    @functools.cached_property
    def _reader(self) -> Any:
        file = self.path / self._manifest["clips"]["file"]
        return safe_open(os.fspath(file), framework="numpy")

    def _column(self, name: str) -> np.ndarray:
        """Returns one of the arrays of `make_columns`."""
        if name not in self._arrays:
            self._arrays[name] = self._reader.get_tensor(name)
        return self._arrays[name]

    def _text(self, name: str) -> list[str]:
        data, bounds = self._column(name).tobytes(), self._column(f"{name}_bounds").tolist()
        parts = (data[start:end] for start, end in itertools.pairwise(bounds))
        return [part.decode("utf-8", "surrogatepass") for part in parts]


class _MappedShard:
    """A memory-mapped shard."""

    def __init__(self, folder: str, number: int) -> None:
        self.path = f"{folder}/{number:05d}.npy"
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise _unreadable(self.path, error) from error
        self._bytes = np.frombuffer(self._map, np.uint8)

    @staticmethod
    def read(rows: np.ndarray, shards: "Sequence[_MappedShard]", offsets: Sequence[int]) -> None:
        """Fills each of `rows`, uint8 `[n, bytes]`, from its shard at its offset."""
        size, pairs = rows.shape[1], list(zip(shards, offsets, strict=True))
        lengths = {shard: shard._map.size() for shard in set(shards)}
        for shard, offset in pairs:
            # Touching pages that the file has lost since it was mapped would end the process.
            if min(lengths[shard], len(shard._bytes)) < offset + size:
                raise _unreadable(shard.path)
        # One call takes a quarter less time than one per row.
        parts = [shard._bytes[offset : offset + size] for shard, offset in pairs]
        np.concatenate(parts, out=rows.reshape(-1))


class _OpenShard:
    """An open shard, closed when its last reader releases it."""

    def __init__(self, folder: str, number: int) -> None:
        self.path = f"{folder}/{number:05d}.npy"
        try:
            self._number = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        weakref.finalize(self, os.close, self._number)

    @staticmethod
    def read(rows: np.ndarray, shards: "Sequence[_OpenShard]", offsets: Sequence[int]) -> None:
        """Fills each of `rows`, uint8 `[n, bytes]`, from its shard at its offset."""
        for row, shard, offset in zip(rows, shards, offsets, strict=True):
            target = row
            try:
                # One call nearly always suffices; an interrupted one returns less.
                while (count := os.preadv(shard._number, [target.data], offset)) < len(target):
                    if count == 0:
                        raise _unreadable(shard.path)
                    target, offset = target[count:], offset + count
            except OSError as error:
                raise _unreadable(shard.path, error) from error


def _unreadable(path: str, error: Exception | None = None) -> UserError:
    if isinstance(error, OSError):
        problem = f"this shard of the store cannot be read ({error.strerror})"
    else:
        problem = "this shard is damaged (it ends early)"
    return UserError(f"{path}: {problem}. {_AGAIN}.")


def make_columns(
    clips: Sequence[Clip],
    label_names: Sequence[str],
    split_names: Sequence[str],
    rows: np.ndarray,
    shards: Iterable[tuple[int, int, int, str]],
) -> dict[str, np.ndarray]:
    """Returns the columns over the clips and shards of a store.

    Args:
      clips: in the store's order.
      label_names: all labels.
      split_names: all splits.
      rows: structured array `[clips]` of `shard` (a position in `shards`), `row`, `length` (real
        frames) and `sha256` (of the source, uint8 `[32]`).
      shards: number, rows, bytes and SHA-256 in hexadecimal of each.

    Returns:
      `clip_id`, `path` and `group_name`: UTF-8, uint8 `[bytes]`, with `<name>_bounds`, int64 `[n +
      1]`: the start of each string and the end of the last. `group`: int32, a position in
      `group_name` or -1. `label`: int32 `[labels of all clips]`, positions in `label_names`, with
      `label_bounds`. `split`: uint8, a position in `split_names`. `shard`, `row`, `length`: int32.
      `sha256`: uint8 `[clips, 32]`. `shard_number` and `shard_rows`: int32. `shard_bytes`: int64.
      `shard_sha256`: uint8 `[shards, 32]`.
    """
    group_names = sorted({clip.group for clip in clips if clip.group is not None})
    groups: dict[str | None, int] = {name: i for i, name in enumerate(group_names)}
    labels, splits = (
        {name: i for i, name in enumerate(each)} for each in (label_names, split_names)
    )
    numbers, counts, sizes, digests = zip(*shards, strict=True)
    return {
        **_pack("clip_id", [clip.clip_id for clip in clips]),
        **_pack("path", [str(clip.path) for clip in clips]),
        **_pack("group_name", group_names),
        "group": np.array([groups.get(clip.group, -1) for clip in clips], np.int32),
        "label": np.array([labels[name] for clip in clips for name in clip.labels], np.int32),
        "label_bounds": _bounds([len(clip.labels) for clip in clips]),
        "split": np.array([splits[clip.split] for clip in clips], np.uint8),
        **{name: rows[name].astype(np.int32) for name in ("shard", "row", "length")},
        "sha256": np.ascontiguousarray(rows["sha256"]),
        "shard_number": np.array(numbers, np.int32),
        "shard_rows": np.array(counts, np.int32),
        "shard_bytes": np.array(sizes, np.int64),
        "shard_sha256": np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32),
    }


def write_manifest(
    path: Path,
    header: dict[str, Any],
    columns: dict[str, np.ndarray],
    skipped: Iterable[dict[str, str]],
) -> None:
    """Writes the columns and then the manifest; an identical file is left unchanged.

    Args:
      path: the store's folder.
      header: features, layout, data set, label names and clips per split.
      columns: from `make_columns`; for a regression also `values`, float32 `[clips, label_names]`.
      skipped: a mapping `clip_id`, `path`, `reason` for each unusable clip.

    Raises:
      UserError: the folder cannot be written, or the disk is full; the store is unchanged.
    """
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped).encode()
    clips = _write_named(path, "clips", ".safetensors", save(columns))
    listed = _write_named(path, "skipped", ".jsonl", lines) if lines else None
    manifest = header | {"schema": SCHEMA, "clips": clips, "skipped": listed}
    file = path / "manifest.json"
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)
    kept = {record["file"] for record in (clips, listed) if record}
    for old in [*path.glob("clips-*.safetensors"), *path.glob("skipped-*.jsonl")]:
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _write_named(path: Path, name: str, ending: str, content: bytes) -> dict[str, Any]:
    """Writes a file named by its content and returns its `file`, `bytes` and `sha256`."""
    digest = hashlib.sha256(content).hexdigest()
    file = path / f"{name}-{digest[:8]}{ending}"
    record = {"file": file.name, "bytes": len(content), "sha256": digest}
    if file_problem(path, record, full=True):
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    return record


def _pack(name: str, strings: Iterable[str]) -> dict[str, np.ndarray]:
    # File names that are not valid text reach Python as lone surrogates.
    parts = [text.encode("utf-8", "surrogatepass") for text in strings]
    data = np.frombuffer(b"".join(parts), np.uint8)
    return {name: data, f"{name}_bounds": _bounds([len(part) for part in parts])}


def _bounds(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def file_problem(folder: Path, record: dict[str, Any], full: bool, what: str = "shard") -> str:
    """Returns a sentence about what is wrong with a file of a store, or "".

    `record` has its `file`, `bytes` and `sha256`; `full` compares the checksum, not only the size.
    """
    file = folder / record["file"]
    try:
        size = file.stat().st_size
    except OSError:
        return f"{file}: this {what} of the store is missing."
    if size != record["bytes"]:
        return f"{file}: this {what} is damaged ({size} bytes instead of {record['bytes']})."
    if full and sha256(file) != record["sha256"]:
        return f"{file}: this {what} is damaged (its SHA-256 is not the one that was written)."
    return ""
