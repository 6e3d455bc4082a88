"""Precomputed spectrograms in `.npz` or `.npy` files, one file a split."""

import csv
import dataclasses
import functools
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.datasets.base import Clip, Dataset, make_dataset
from musicgenre.datasets.gtzan import artist_groups
from musicgenre.errors import UserError

# An archive that unpacks to more than this is refused before it is unpacked.
MAX_BYTES = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """Spectrograms and what is known of them.

    Attributes:
      path: the file.
      values: `[clips, mels, frames]` ("mel_time") or `[clips, frames, mels]`; dB, or uint8 steps below 0 dB.
      db_min: dB of the lowest step for each clip when `values` is uint8, else None.
      layout: "mel_time" or "time_mel".
      clip_ids: `[clips]`.
      labels: `[clips]`.
      groups: `[clips]`, None where not known.
      label_names: in the order of the file's class numbers; empty where labels are strings without a list.
    """

    path: Path
    values: np.ndarray
    db_min: np.ndarray | None
    layout: str
    clip_ids: list[str]
    labels: list[str]
    groups: list[str | None]
    label_names: tuple[str, ...]

    @property
    def frames_and_bands(self) -> tuple[int, int]:
        """Frames and bands of every clip."""
        a, b = self.values.shape[1:]
        return (b, a) if self.layout == "mel_time" else (a, b)

    def spectrogram(self, row: int) -> np.ndarray:
        """Returns a clip's log-mel spectrogram in dB, float32 `[frames, mels]`.

        uint8 step s stands for `db_min * (1 - (s + 0.5) / 256)`, so that 0 dB is the clip's maximum.

        Raises:
          UserError: a value is NaN or infinite.
        """
        values: np.ndarray = np.asarray(self.values[row], np.float32)
        if self.db_min is not None:
            values = np.float32(self.db_min[row]) * (1 - (values + np.float32(0.5)) / 256)
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: the spectrogram of {self.clip_ids[row]} has values that are not finite numbers.")
        return np.ascontiguousarray(values.T if self.layout == "mel_time" else values)


def load_arrays(root: str | Path, files: Mapping[str, str], layout: str = "mel_time") -> Dataset:
    """Reads a data set of arrays.

    An `.npz` holds `spectrogram` (uint8 with `db_min`, or floats in dB), `label` (numbers into `genres` or `label_names`, or
    strings), `clip_id`, and optionally `group`. An `.npy` holds the spectrograms and has a CSV file of the same name
    beside it, with the columns clip_id, label and optionally group. GTZAN's clip ids get their artist as the group.

    Args:
      root: the folder that the files are relative to.
      files: the file of each split; "" leaves a split out.
      layout: order of the axes after the clips, "mel_time" or "time_mel".

    Raises:
      UserError: no file, an unknown split, or files that cannot be used or do not fit together.
    """
    given = {split: Path(root) / name for split, name in files.items() if name}
    if not given:
        raise UserError("data set 'arrays': no files. Set --config.data.files.train=... (and valid, test).")
    opened = {split: open_array_file(path, layout) for split, path in given.items()}
    first = next(iter(opened.values()))
    names = first.label_names or tuple(sorted({label for file in opened.values() for label in file.labels}))
    clips = []
    for split, file in opened.items():
        if file.frames_and_bands != first.frames_and_bands:
            raise UserError(
                f"{file.path}: clips of {file.frames_and_bands} (frames, bands) where {first.path} has {first.frames_and_bands}."
            )
        if file.label_names and file.label_names != names:
            raise UserError(
                f"{file.path}: its label names {', '.join(file.label_names)} are not those of {first.path} ({', '.join(names)})."
            )
        for row, (clip_id, label, group) in enumerate(zip(file.clip_ids, file.labels, file.groups, strict=True)):
            clips.append(Clip(clip_id, file.path, (label,), split, group, row))
    return make_dataset(Dataset("arrays", Path(root), "files given", "single_label", names, tuple(clips)))


@functools.lru_cache(maxsize=8)
def open_array_file(path: Path, layout: str = "mel_time") -> ArrayFile:
    """Opens a file of spectrograms; never unpickles anything, and checks an archive before it is unpacked.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    if layout not in ("mel_time", "time_mel"):
        raise UserError(f"data.array_layout must be 'mel_time' or 'time_mel', not {layout!r}.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    fields = _read_npz(path) if path.suffix == ".npz" else _read_npy(path)
    for name in ("spectrogram", "label", "clip_id"):
        if name not in fields:
            raise UserError(f"{path}: no array {name!r}; it has {', '.join(sorted(fields))}.")
    values = fields["spectrogram"]
    if values.ndim != 3 or 0 in values.shape:
        raise UserError(f"{path}: spectrogram has the shape {list(values.shape)}; [clips, mels, frames] is needed.")
    db_min = fields.get("db_min")
    if values.dtype == np.uint8 and db_min is None:
        raise UserError(f"{path}: spectrogram is uint8, so an array db_min is needed.")
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise UserError(f"{path}: spectrogram is {values.dtype}; uint8 (with db_min) or floating point is needed.")
    for name in ("label", "clip_id", "group", "db_min"):
        if name in fields and np.shape(fields[name]) != (len(values),):
            raise UserError(f"{path}: {name} has the shape {list(np.shape(fields[name]))} for {len(values)} spectrograms.")
    names = tuple(str(name) for name in fields.get("genres", fields.get("label_names", ())))
    label = fields["label"]
    if label.dtype.kind in "iu":
        if not names:
            raise UserError(f"{path}: label holds numbers, so an array genres (or label_names) with their names is needed.")
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < len(names):
            wrong = int(np.flatnonzero((label.astype(int) < 0) | (label.astype(int) >= len(names)))[0])
            raise UserError(f"{path}: label {label[wrong]} of {fields['clip_id'][wrong]} is not one of the {len(names)} genres.")
        labels = [names[i] for i in label]
    else:
        labels = [str(item) for item in label]
    ids = [str(item) for item in fields["clip_id"]]
    artists = artist_groups()
    groups = (
        [str(group) or None for group in fields["group"]] if "group" in fields else [artists.get(i, (None, 0))[0] for i in ids]
    )
    return ArrayFile(path, values, db_min if values.dtype == np.uint8 else None, layout, ids, labels, groups, names)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            total = 0
            for member in archive.infolist():
                if member.flag_bits & 1 or "/" in member.filename or not member.filename.endswith(".npy"):
                    raise UserError(f"{path}: the member {member.filename!r} is no plain array.")
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                    if dtype.hasobject:
                        raise UserError(f"{path}: {member.filename} holds Python objects; these are never loaded.")
                    size = math.prod(shape) * dtype.itemsize
                    needed = stream.tell() + size
                    if needed != member.file_size:
                        raise UserError(
                            f"{path}: {member.filename} is damaged ({member.file_size} bytes where {needed} are needed)."
                        )
                total += size
            if total > MAX_BYTES:
                raise UserError(
                    f"{path}: unpacks to {total / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:.0f} GiB that are allowed. "
                    "Split it, or use .npy files, which need not fit into memory."
                )
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: not an .npz archive that can be read ({error}).") from error


def _read_npy(path: Path) -> dict[str, Any]:
    table = path.with_suffix(".csv")
    try:
        fields: dict[str, Any] = {"spectrogram": np.load(path, mmap_mode="r", allow_pickle=False)}
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not an .npy array that can be read ({error}).") from error
    if not table.is_file():
        raise UserError(f"{table}: no such file; {path.name} needs it for clip_id and label.")
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("clip_id", "label", "group"):
        if rows and name in rows[0]:
            fields[name] = np.array([row[name] or "" for row in rows])
    return fields
