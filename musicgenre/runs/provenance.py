"""What a model was trained on: the record of its clips, which the leakage audit compares."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicgenre.errors import UserError
from musicgenre.evaluation.audit import AuditSide, fingerprint_spectrogram
from musicgenre.files import read_arrays, read_json
from musicgenre.store.store import Store

# The record of a run, in its workdir.
CLIPS_FILE = "train_clips.json"
# A bundle's format; it holds the record in two of its arrays.
KEY, SCHEMA = "musicgenre", 2
PREFIX = "trained_on/"
_CLIPS, _FINGERPRINTS = f"{PREFIX}clips", f"{PREFIX}fingerprints"
# A fingerprint takes 2 KB: those of more clips would make a bundle larger than 100 MB.
MOST_FINGERPRINTS = 50_000


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedOn:
    """The clips that a model has learnt from, in the same order in every list.

    The clips of the model that training started from, and of its teachers, are among them.

    Attributes:
      clip_ids: ids, `[clips]`.
      hashes: SHA-256 of each source (the file, or the array row) in hexadecimal, `[clips]`.
      groups: the artist or track of each clip, or None, `[clips]`.
      unknown: whose clips are not known; "" if all are.
      sources: stores that held the clips when the model was trained, and bundles.
      fingerprints: from `fingerprints` or `compact`, `[clips, d]`; None if not known, as for a
        workdir until `with_fingerprints` computes them.
    """

    clip_ids: Sequence[str] = ()
    hashes: Sequence[str | None] = ()
    groups: Sequence[str | None] = ()
    unknown: str = ""
    sources: Sequence[str] = ()
    fingerprints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.clip_ids)

    def has_seen(self, clip_ids: Sequence[str], hashes: Sequence[str]) -> np.ndarray:
        """Returns which clips the model may have been trained on, bool `[n]`.

        A clip is recognised by its id or its content. If `unknown` is not empty, all are True.
        """
        contents = [content for content in self.hashes if content]
        return np.isin(clip_ids, self.clip_ids) | np.isin(hashes, contents) | bool(self.unknown)

    def with_fingerprints(self) -> "TrainedOn":
        """Returns the record with fingerprints from its sources, without if a clip is in none."""
        if self.fingerprints is not None or not len(self):
            return self
        clips = list(zip(self.clip_ids, self.hashes, strict=True))
        found: dict[tuple[str, str | None], np.ndarray] = {}
        for source in self.sources:
            with contextlib.suppress(UserError):  # the source is gone
                found |= _fingerprints_in(Path(source), set(clips) - found.keys())
        if not all(clip in found for clip in clips):
            return self
        return dataclasses.replace(self, fingerprints=np.stack([found[clip] for clip in clips]))

    def audit_side(self) -> AuditSide:
        """Returns the record as one side of `musicgenre.evaluation.audit.audit`."""
        prints = None if self.fingerprints is None else self.fingerprints.astype(np.float32)
        return AuditSide(self.clip_ids, self.hashes, self.groups, prints)

    def to_json(self) -> dict[str, Any]:
        """Returns the record without fingerprints as JSON values, for `train_clips.json`."""
        return {
            "clip_id": list(self.clip_ids),
            "sha256": list(self.hashes),
            "group": list(self.groups),
            "unknown": self.unknown,
            "sources": list(self.sources),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TrainedOn":
        """Reads what `to_json` returned, or the content of a `train_clips.json` of any version."""
        sources = [record["store"]] if "store" in record else record.get("sources", [])
        ids, hashes, groups = (record[name] for name in ("clip_id", "sha256", "group"))
        records = [cls(ids, hashes, groups, record.get("unknown", ""), sources)]
        for name in ("init_from", "teachers"):
            if (other := record.get(name, {})) is None:
                message = "the model that this run started from does not list them"
                records.append(cls(unknown=message))
            elif other:
                records.append(cls.from_json(other))
        return joined(records)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the record as arrays for a bundle; the paths of its sources are left out."""
        if not len(self):
            return {}
        text = json.dumps(self.to_json() | {"sources": []})
        arrays = {_CLIPS: np.frombuffer(text.encode(), np.uint8)}
        prints = self.with_fingerprints().fingerprints if len(self) <= MOST_FINGERPRINTS else None
        return arrays if prints is None else arrays | {_FINGERPRINTS: compact(prints)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], source: Path) -> "TrainedOn":
        """Reads what `to_arrays` returned, from the arrays of the bundle `source`."""
        if _CLIPS not in arrays:  # schema 1, or nothing was known
            return cls(unknown=f"{source.name} does not list them")
        record = cls.from_json(json.loads(arrays[_CLIPS].tobytes()))
        return dataclasses.replace(
            record, sources=[os.path.abspath(source)], fingerprints=arrays.get(_FINGERPRINTS)
        )


UNKNOWN = TrainedOn(unknown="the model does not list them")


def joined(records: Iterable[TrainedOn], known: Collection[str] = ()) -> TrainedOn:
    """Joins records, each clip once and without `known` ids. The result has no fingerprints."""
    records = list(records)
    clips: dict[str, tuple[str | None, str | None]] = {}
    for record in records:
        rows = zip(record.clip_ids, record.hashes, record.groups, strict=True)
        for clip_id, content, group in rows:
            if clip_id not in known:
                clips.setdefault(clip_id, (content, group))
    return TrainedOn(
        list(clips),
        [content for content, _ in clips.values()],
        [group for _, group in clips.values()],
        "; ".join(dict.fromkeys(record.unknown for record in records if record.unknown)),
        list(dict.fromkeys(source for record in records for source in record.sources)),
    )


def clips_of(store: Store, indices: np.ndarray) -> TrainedOn:
    """Returns the record of some clips of a store, without fingerprints."""
    ids, hashes = store.clip_ids[indices].tolist(), store.hashes[indices].tolist()
    groups = [store.groups[i] for i in indices]
    return TrainedOn(ids, hashes, groups, sources=[os.path.abspath(store.path)])


def read_workdir(workdir: Path) -> TrainedOn:
    """Reads what a run was trained on; raises UserError if its record cannot be read."""
    path = workdir / CLIPS_FILE
    if not path.is_file():
        return TrainedOn(unknown=f"{workdir.name} does not list them")
    try:
        return TrainedOn.from_json(read_json(path, "list of training clips"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of training clips ({error!r}).") from error


def read_bundle_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads all arrays and the notes of a bundle; see `musicgenre.runs.bundle.read_bundle`."""
    remedy = "Copy the file again, or make one with: musicgenre bundle <workdir> <file>"
    return read_arrays(path, key=KEY, schemas=(1, SCHEMA), what="model", remedy=remedy)


def fingerprints(store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns the fingerprints of clips, float32 `[n, d]`, computed over their real frames."""
    clips = (store.gather(np.array([i]))[0, : store.lengths[i]] for i in indices)
    return np.stack([fingerprint_spectrogram(clip.astype(np.float32)) for clip in clips])


def compact(prints: np.ndarray) -> np.ndarray:
    """Returns fingerprints `[n, d]` as int8 with a peak of 127; the cosine ignores the scale."""
    if prints.dtype == np.int8:
        return prints
    peaks = np.abs(prints).max(axis=1, keepdims=True)
    return np.rint(prints * (127 / np.where(peaks > 0, peaks, 1))).astype(np.int8)


def _fingerprints_in(
    source: Path, wanted: Collection[tuple[str, str | None]]
) -> dict[tuple[str, str | None], np.ndarray]:
    """Returns the fingerprints that a store or bundle has of clips, each an id and a hash."""
    if source.is_file():
        there = TrainedOn.from_arrays(read_bundle_arrays(source)[0], source)
        prints = there.audit_side().fingerprints
        clips = zip(there.clip_ids, there.hashes, strict=True)
        if prints is None:
            return {}
        return {clip: row for clip, row in zip(clips, prints, strict=True) if clip in wanted}
    store = Store.open(source, verify=False)
    own = list(zip(store.clip_ids.tolist(), store.hashes.tolist(), strict=True))
    rows = [i for i, clip in enumerate(own) if clip in wanted]
    return {own[i]: fingerprints(store, np.array([i]))[0] for i in rows}
