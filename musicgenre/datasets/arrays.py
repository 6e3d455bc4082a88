"""Precomputed spectrograms in `.npz` or `.npy` files, one file per split."""

import csv
import dataclasses
import functools
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from musicgenre.datasets.base import Clip, Dataset
from musicgenre.datasets.gtzan import artist_groups
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import kfold_split
from musicgenre.errors import UserError, did_you_mean

FOLD_PROTOCOLS = ("artist_kfold", "random_kfold", "segment_leaked")
PROTOCOLS = ("files", *FOLD_PROTOCOLS)
# Between the id of a clip and the number of a segment of it.
_SEGMENT = "#"
# An archive that unpacks to more than this is refused before it is unpacked.
MAX_BYTES = 8 * 2**30
_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """Spectrograms and their clips.

    `values` are dB, or uint8 steps below 0 dB. `layout` is "mel_time" or "time_mel".
    """

    path: Path
    values: np.ndarray  # [clips, mels, frames] ("mel_time") or [clips, frames, mels]
    db_min: np.ndarray | None  # dB of the lowest step of each clip when `values` is uint8
    layout: str
    clip_ids: list[str]
    labels: list[str]  # [clips]
    groups: list[str | None]  # [clips], None where unknown
    label_names: tuple[str, ...]  # by class number; empty where labels are strings without a list

    @property
    def frames_and_bands(self) -> tuple[int, int]:
        """Frames and bands of every clip."""
        a, b = self.values.shape[1:]
        return (b, a) if self.layout == "mel_time" else (a, b)

    def segment_row(self, row: int, index: int, count: int) -> int:
        """Returns the row number by which `spectrogram` knows segment `index` of `count` of a clip.

        After the rows of complete clips come those of the first halves of all clips, their second
        halves, their first thirds and so on.
        """
        return row + len(self.values) * (count * (count - 1) // 2 + index)

    def spectrogram(self, row: int) -> np.ndarray:
        """Returns the log-mel spectrogram in dB of a clip or segment, float32 `[frames, mels]`.

        uint8 step s stands for `db_min * (1 - (s + 0.5) / 256)`: 0 dB is the clip's maximum.

        Args:
          row: of a clip, or a segment's as `segment_row` numbers it.

        Raises:
          UserError: a value is NaN or infinite.
        """
        block, row = divmod(row, len(self.values))
        count = (1 + math.isqrt(1 + 8 * block)) // 2
        index, frames = block - count * (count - 1) // 2, self.frames_and_bands[0] // count
        part = slice(index * frames, (index + 1) * frames) if count > 1 else slice(None)
        values: np.ndarray = np.asarray(self.values[row], np.float32)
        values = (values.T if self.layout == "mel_time" else values)[part]
        if self.db_min is not None:
            values = np.float32(self.db_min[row]) * (1 - (values + np.float32(0.5)) / 256)
        if not np.isfinite(values).all():
            name = self.clip_ids[row]
            raise UserError(
                f"{self.path}: the spectrogram of {name} has values that are not finite."
            )
        return np.ascontiguousarray(values)


@register("arrays", needs_root=False)
def load_arrays(
    root: str | Path,
    files: Mapping[str, str],
    layout: str = "mel_time",
    protocol: str = "files",
    *,
    fold: int = 0,
    folds: int = 10,
    seed: int = 42,
    frames: int = 0,
) -> Dataset:
    """Reads a data set of arrays.

    An `.npz` holds `spectrogram` (uint8 with `db_min`, or floats in dB), `label` (numbers into
    `genres` or `label_names`, or strings), `clip_id`, and optionally `group`. An `.npy` holds the
    spectrograms, and a CSV file of the same name the columns clip_id, label and optionally group.
    GTZAN's clip ids get their artist as the group.

    Args:
      root: the folder that the files are relative to.
      files: the file of each split; "" leaves a split out.
      layout: order of the axes after the clips, "mel_time" or "time_mel".
      protocol: "files" splits as the files do. The others split the clips of the train and valid
        files again, into stratified folds of which one is "valid" and the rest "train"; the test
        file stays the test split. "artist_kfold" keeps each artist in one fold. "random_kfold"
        ignores artists. "segment_leaked" splits the segments of the clips, so that nearly every
        clip is on both sides: it shows what such an evaluation is worth and must not be believed.
      fold: which fold is "valid".
      folds: number of folds.
      seed: of the folds.
      frames: of a segment; a clip has as many equal segments as have at least so many frames.

    Raises:
      UserError: no file, an unknown split or protocol, files that cannot be used or do not match,
        impossible folds (see `kfold_split`), or clips too short for two segments.
    """
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        raise UserError(f"data.protocol: arrays have no protocol {protocol!r}.{hint}")
    opened = {
        split: open_array_file(Path(root) / name, layout) for split, name in files.items() if name
    }
    if not opened:
        raise UserError("data set 'arrays': no files. Set --config.data.files.train=...")
    first = next(iter(opened.values()))
    names = first.label_names or tuple(sorted({x for file in opened.values() for x in file.labels}))
    segments = 1
    if protocol == "segment_leaked":
        available = first.frames_and_bands[0]
        segments = available // frames if frames > 0 else 0
        if segments < 2:
            raise UserError(
                f"{first.path}: clips of {available} frames do not hold two segments of "
                f"data.frames={frames}."
            )
    clips: list[Clip] = []
    for split, file in opened.items():
        if file.frames_and_bands != first.frames_and_bands:
            shapes = f"{file.frames_and_bands} (frames, bands), not {first.frames_and_bands}"
            raise UserError(f"{file.path}: clips of {shapes} as {first.path} has.")
        if file.label_names and file.label_names != names:
            raise UserError(
                f"{file.path}: its label names {', '.join(file.label_names)} are not those of "
                f"{first.path} ({', '.join(names)})."
            )
        rows = zip(file.clip_ids, file.labels, file.groups, strict=True)
        for row, (clip_id, label, group) in enumerate(rows):
            clip = Clip(clip_id, file.path, (label,), split, group, row)
            clips += [clip] if segments == 1 else _segments(clip, file, row, segments)
    described = "files given"
    if protocol != "files":
        pool = [clip for clip in clips if clip.split != "test"]
        if not pool:
            raise UserError("folds are made of the train and valid files: set data.files.train.")
        groups = [clip.group for clip in pool] if protocol == "artist_kfold" else None
        splits = kfold_split([clip.labels[0] for clip in pool], folds, fold, seed, groups)
        clips = [clip for clip in clips if clip.split == "test"] + [
            dataclasses.replace(clip, split=split) for clip, split in zip(pool, splits, strict=True)
        ]
        cut = f", {segments} segments a clip" if segments > 1 else ""
        described = f"{protocol} fold {fold} of {folds}, seed {seed}{cut}"
    return Dataset("arrays", Path(root), described, "single_label", names, clips)


def _segments(clip: Clip, file: ArrayFile, row: int, count: int) -> list[Clip]:
    """Returns a clip's segments. Those of a clip by an unknown artist are a group of their own."""
    ids = [f"{clip.clip_id}{_SEGMENT}{index}" for index in range(count)]
    rows = [file.segment_row(row, index, count) for index in range(count)]
    group = clip.group or _own_group(clip.clip_id)
    return [
        dataclasses.replace(clip, clip_id=clip_id, group=group, row=row)
        for clip_id, row in zip(ids, rows, strict=True)
    ]


def _own_group(clip_id: str) -> str:
    return f"clip {clip_id}"


def artist_known(clip_id: str, group: str | None) -> bool:
    """Returns whether the artist of a clip or segment is known."""
    return group is not None and group != _own_group(whole_clip(clip_id))


def whole_clip(clip_id: str) -> str:
    """Returns the id of the clip that a segment is part of; other ids are unchanged."""
    return clip_id.rsplit(_SEGMENT, 1)[0]


@functools.lru_cache(maxsize=8)
def open_array_file(path: Path, layout: str = "mel_time") -> ArrayFile:
    """Opens a file of spectrograms. It unpickles nothing, and checks an archive's size first.

    Args:
      path: an `.npz` file, or an `.npy` file with its CSV file.
      layout: "mel_time" or "time_mel".

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    if layout not in ("mel_time", "time_mel"):
        raise UserError(f"data.array_layout must be 'mel_time' or 'time_mel', not {layout!r}.")
    if not path.is_file():
        raise UserError(f"{path}: no such file. Set --config.data.root=... to its folder.")
    try:
        fields = _read_npz(path) if path.suffix == ".npz" else _read_npy(path)
    except _UNREADABLE as error:
        raise UserError(f"{path}: not an {path.suffix} file that can be read ({error}).") from error
    for name in ("spectrogram", "label", "clip_id"):
        if name not in fields:
            raise UserError(f"{path}: no array {name!r}; it has {', '.join(sorted(fields))}.")
    values, db_min = fields["spectrogram"], fields.get("db_min")
    problem = ""
    if values.ndim != 3 or 0 in values.shape:
        problem = f"has the shape {list(values.shape)}; [clips, mels, frames] is needed"
    elif values.dtype == np.uint8 and db_min is None:
        problem = "is uint8, so an array db_min is needed"
    elif values.dtype != np.uint8 and values.dtype.kind != "f":
        problem = f"is {values.dtype}; uint8 (with db_min) or floating point is needed"
    if problem:
        raise UserError(f"{path}: spectrogram {problem}.")
    for name in ("label", "clip_id", "group", "db_min"):
        if name in fields and fields[name].shape != (len(values),):
            shape = list(fields[name].shape)
            raise UserError(f"{path}: {name} has the shape {shape} for {len(values)} spectrograms.")
    ids = [str(item) for item in fields["clip_id"]]
    names = tuple(str(name) for name in fields.get("genres", fields.get("label_names", ())))
    artists = artist_groups()
    groups = [artists.get(clip_id, (None, 0))[0] for clip_id in ids]
    if "group" in fields:
        groups = [str(group) or None for group in fields["group"]]
    labels = fields["label"].tolist()
    if fields["label"].dtype.kind in "iu":
        if not names:
            raise UserError(f"{path}: label holds numbers, so an array genres must name them.")
        for number, clip_id in zip(labels, ids, strict=True):
            if not 0 <= number < len(names):
                genres = f"one of the {len(names)} genres"
                raise UserError(f"{path}: label {number} of {clip_id} is not {genres}.")
        labels = [names[number] for number in labels]
    db_min = db_min if values.dtype == np.uint8 else None
    return ArrayFile(path, values, db_min, layout, ids, list(map(str, labels)), groups, names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist()) / 2**30
    if total > MAX_BYTES / 2**30:
        raise UserError(f"{path}: unpacks to {total:.1f} GiB. Use .npy files, which are mapped.")
    with np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}


def _read_npy(path: Path) -> dict[str, np.ndarray]:
    spectrogram = np.load(path, mmap_mode="r", allow_pickle=False)
    table = path.with_suffix(".csv")
    if not table.is_file():
        raise UserError(f"{table}: no such file; {path.name} needs it for clip_id and label.")
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {"clip_id", "label", "group"} & set(rows[0] if rows else ())
    columns = {name: np.array([row[name] or "" for row in rows]) for name in found}
    return {"spectrogram": spectrogram, **columns}
