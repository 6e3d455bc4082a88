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
from musicgenre.datasets.registry import register
from musicgenre.datasets.splits import kfold_split
from musicgenre.errors import UserError, did_you_mean

FOLD_PROTOCOLS = ("artist_kfold", "random_kfold", "segment_leaked")
PROTOCOLS = ("files", *FOLD_PROTOCOLS)
# Between the id of a clip and the number of a segment of it.
_SEGMENT = "#"
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

    def segment_row(self, row: int, index: int, count: int) -> int:
        """Returns the number by which `spectrogram` knows segment `index` (from 0) of the `count` that a clip is cut into.

        After the rows of whole clips come those of the first halves of all clips, their second halves, first thirds and so on.
        """
        return row + len(self.values) * (count * (count - 1) // 2 + index)

    def spectrogram(self, row: int) -> np.ndarray:
        """Returns a clip's log-mel spectrogram in dB, float32 `[frames, mels]`, or that of a segment, see `segment_row`.

        uint8 step s stands for `db_min * (1 - (s + 0.5) / 256)`, so that 0 dB is the clip's maximum.

        Raises:
          UserError: a value is NaN or infinite.
        """
        block, row = divmod(row, len(self.values))
        count = (1 + math.isqrt(1 + 8 * block)) // 2
        index, frames = block - count * (count - 1) // 2, self.frames_and_bands[0] // count
        part = slice(index * frames, (index + 1) * frames) if count > 1 else slice(None)
        values: np.ndarray = np.asarray(self.values[row], np.float32)
        values = values[:, part] if self.layout == "mel_time" else values[part]
        if self.db_min is not None:
            values = np.float32(self.db_min[row]) * (1 - (values + np.float32(0.5)) / 256)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.path}: the spectrogram of {self.clip_ids[row]} has values that are not finite numbers."
            )
        return np.ascontiguousarray(values.T if self.layout == "mel_time" else values)


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

    An `.npz` holds `spectrogram` (uint8 with `db_min`, or floats in dB), `label` (numbers into `genres` or `label_names`, or
    strings), `clip_id`, and optionally `group`. An `.npy` holds the spectrograms and has a CSV file of the same name
    beside it, with the columns clip_id, label and optionally group. GTZAN's clip ids get their artist as the group.

    Args:
      root: the folder that the files are relative to.
      files: the file of each split; "" leaves a split out.
      layout: order of the axes after the clips, "mel_time" or "time_mel".
      protocol: "files" splits as the files do. The others deal the clips of the train and valid files out again, in stratified
        folds of which one is "valid" and the rest "train"; the test file stays the test split. "artist_kfold" keeps each
        artist in one fold. "random_kfold" does not look at artists. "segment_leaked" cuts the clips into segments and deals
        these out, so that nearly every clip is on both sides: to show what such an evaluation is worth, not to be believed.
      fold: which fold is "valid".
      folds: number of folds.
      seed: of the folds.
      frames: of a segment; a clip is cut into as many equal parts as have so many.

    Raises:
      UserError: no file, an unknown split or protocol, files that cannot be used or do not fit together, folds that cannot be
        made (see `kfold_split`), or clips too short for two segments.
    """
    if protocol not in PROTOCOLS:
        raise UserError(
            f"data.protocol: arrays have no protocol {protocol!r}."
            + did_you_mean(protocol, PROTOCOLS)
        )
    given = {split: Path(root) / name for split, name in files.items() if name}
    if not given:
        raise UserError(
            "data set 'arrays': no files. Set --config.data.files.train=... (and valid, test)."
        )
    opened = {split: open_array_file(path, layout) for split, path in given.items()}
    first = next(iter(opened.values()))
    names = first.label_names or tuple(
        sorted({label for file in opened.values() for label in file.labels})
    )
    segments = 1
    if protocol == "segment_leaked":
        segments = first.frames_and_bands[0] // frames if frames > 0 else 0
        if segments < 2:
            raise UserError(
                f"{first.path}: clips of {first.frames_and_bands[0]} frames do not hold two segments of data.frames={frames}."
            )
    clips: list[Clip] = []
    for split, file in opened.items():
        if file.frames_and_bands != first.frames_and_bands:
            raise UserError(
                f"{file.path}: clips of {file.frames_and_bands} (frames, bands) where {first.path} has {first.frames_and_bands}."
            )
        if file.label_names and file.label_names != names:
            raise UserError(
                f"{file.path}: its label names {', '.join(file.label_names)} are not those of {first.path} ({', '.join(names)})."
            )
        for row, (clip_id, label, group) in enumerate(
            zip(file.clip_ids, file.labels, file.groups, strict=True)
        ):
            clip = Clip(clip_id, file.path, (label,), split, group, row)
            clips += [clip] if segments == 1 else _cut(clip, file, segments)
    described = "files given"
    if protocol != "files":
        clips = _dealt_out(clips, folds, fold, seed, by_artist=protocol == "artist_kfold")
        cut = f", {segments} segments a clip" if segments > 1 else ""
        described = f"{protocol} fold {fold} of {folds}, seed {seed}{cut}"
    return make_dataset(
        Dataset("arrays", Path(root), described, "single_label", names, tuple(clips))
    )


def _cut(clip: Clip, file: ArrayFile, segments: int) -> list[Clip]:
    """Returns a clip's segments; those of a clip by an unknown artist are a group of their own, for they belong together."""
    group = clip.group or _own_group(clip.clip_id)
    return [
        dataclasses.replace(
            clip,
            clip_id=f"{clip.clip_id}{_SEGMENT}{index}",
            group=group,
            row=file.segment_row(clip.row or 0, index, segments),
        )
        for index in range(segments)
    ]


def _dealt_out(clips: list[Clip], folds: int, fold: int, seed: int, by_artist: bool) -> list[Clip]:
    """Returns the clips, those of train and valid split anew by `kfold_split`."""
    pool = [clip for clip in clips if clip.split != "test"]
    if not pool:
        raise UserError(
            "data set 'arrays': folds are made of the train and valid files. Set --config.data.files.train=..."
        )
    groups = [clip.group for clip in pool] if by_artist else None
    splits = kfold_split([clip.labels[0] for clip in pool], folds, fold, seed, groups)
    dealt = [
        dataclasses.replace(clip, split=split) for clip, split in zip(pool, splits, strict=True)
    ]
    return dealt + [clip for clip in clips if clip.split == "test"]


def _own_group(clip_id: str) -> str:
    return f"clip {clip_id}"


def artist_known(clip_id: str, group: str | None) -> bool:
    """Returns whether a clip or segment is by an artist that is known."""
    return group is not None and group != _own_group(whole_clip(clip_id))


def whole_clip(clip_id: str) -> str:
    """Returns the id of the clip that a segment was cut from, or that of a whole clip as it is."""
    return clip_id.rsplit(_SEGMENT, 1)[0]


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
        raise UserError(
            f"{path}: spectrogram has the shape {list(values.shape)}; [clips, mels, frames] is needed."
        )
    db_min = fields.get("db_min")
    if values.dtype == np.uint8 and db_min is None:
        raise UserError(f"{path}: spectrogram is uint8, so an array db_min is needed.")
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise UserError(
            f"{path}: spectrogram is {values.dtype}; uint8 (with db_min) or floating point is needed."
        )
    for name in ("label", "clip_id", "group", "db_min"):
        if name in fields and np.shape(fields[name]) != (len(values),):
            raise UserError(
                f"{path}: {name} has the shape {list(np.shape(fields[name]))} for {len(values)} spectrograms."
            )
    names = tuple(str(name) for name in fields.get("genres", fields.get("label_names", ())))
    label = fields["label"]
    if label.dtype.kind in "iu":
        if not names:
            raise UserError(
                f"{path}: label holds numbers, so an array genres (or label_names) with their names is needed."
            )
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < len(names):
            wrong = int(
                np.flatnonzero((label.astype(int) < 0) | (label.astype(int) >= len(names)))[0]
            )
            raise UserError(
                f"{path}: label {label[wrong]} of {fields['clip_id'][wrong]} is not one of the {len(names)} genres."
            )
        labels = [names[i] for i in label]
    else:
        labels = [str(item) for item in label]
    ids = [str(item) for item in fields["clip_id"]]
    artists = artist_groups()
    groups = (
        [str(group) or None for group in fields["group"]]
        if "group" in fields
        else [artists.get(i, (None, 0))[0] for i in ids]
    )
    return ArrayFile(
        path,
        values,
        db_min if values.dtype == np.uint8 else None,
        layout,
        ids,
        labels,
        groups,
        names,
    )


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            total = 0
            for member in archive.infolist():
                if (
                    member.flag_bits & 1
                    or "/" in member.filename
                    or not member.filename.endswith(".npy")
                ):
                    raise UserError(f"{path}: the member {member.filename!r} is no plain array.")
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(stream)
                    if dtype.hasobject:
                        raise UserError(
                            f"{path}: {member.filename} holds Python objects; these are never loaded."
                        )
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
