"""What a model was trained on: the record of its clips, which the leakage audit compares."""

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
      sources: stores that held the clips when the model was trained, and bundles with their
        fingerprints.
      fingerprints: from `fingerprints` or `compact`, `[clips, d]`; None if they are not known, as
        for a workdir until `with_fingerprints` computes them.
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
        ids, contents = set(self.clip_ids), set(self.hashes) - {"", None}
        seen = [
            clip_id in ids or content in contents
            for clip_id, content in zip(clip_ids, hashes, strict=True)
        ]
        return np.array(seen, bool) | bool(self.unknown)

    def with_fingerprints(self) -> "TrainedOn":
        """Returns the record with fingerprints, taken from its sources unless it has them already.

        If a clip is no longer in any source, the record is returned without fingerprints.
        """
        if self.fingerprints is not None or not len(self):
            return self
        rows = {clip: row for row, clip in enumerate(zip(self.clip_ids, self.hashes, strict=True))}
        found: dict[int, np.ndarray] = {}
        for source in self.sources:
            wanted = {clip: row for clip, row in rows.items() if row not in found}
            try:
                found |= _fingerprints_in(Path(source), wanted)
            except UserError:  # the source is gone
                continue
        if len(found) < len(self):
            return self
        return dataclasses.replace(
            self, fingerprints=np.stack([found[row] for row in range(len(self))])
        )

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
        records = [
            cls(
                record["clip_id"],
                record["sha256"],
                record["group"],
                record.get("unknown", ""),
                [record["store"]] if "store" in record else record.get("sources", []),
            )
        ]
        if "init_from" in record:
            message = "the model that this run started from does not list them"
            before = record["init_from"]
            records.append(cls(unknown=message) if before is None else cls.from_json(before))
        if "teachers" in record:
            records.append(cls.from_json(record["teachers"]))
        return joined(records)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns the record as arrays for a bundle; the paths of its sources are left out."""
        if not len(self):
            return {}
        text = json.dumps(self.to_json() | {"sources": []})
        arrays = {_CLIPS: np.frombuffer(text.encode(), np.uint8)}
        if len(self) <= MOST_FINGERPRINTS:
            prints = self.with_fingerprints().fingerprints
            if prints is not None:
                arrays[_FINGERPRINTS] = compact(prints)
        return arrays

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
    """Returns one record of the clips of several, each once, without those whose ids are known.

    It has no fingerprints.
    """
    records = list(records)
    clips: dict[str, tuple[str | None, str | None]] = {}
    for record in records:
        for clip_id, content, group in zip(
            record.clip_ids, record.hashes, record.groups, strict=True
        ):
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
    return TrainedOn(
        store.clip_ids[indices].tolist(),
        store.hashes[indices].tolist(),
        [store.groups[i] for i in indices],
        sources=[os.path.abspath(store.path)],
    )


def read_workdir(workdir: Path) -> TrainedOn:
    """Reads what a run was trained on from its workdir.

    Raises:
      UserError: the record cannot be read.
    """
    path = workdir / CLIPS_FILE
    if not path.is_file():
        return TrainedOn(unknown=f"{workdir.name} does not list them")
    try:
        return TrainedOn.from_json(read_json(path, "list of training clips"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a list of training clips ({error!r}).") from error


def read_bundle_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads all arrays and the notes of a bundle; see `musicgenre.runs.bundle.read_bundle`."""
    return read_arrays(
        path,
        key=KEY,
        schemas=(1, SCHEMA),
        what="model",
        remedy="Copy the file again, or make one with: musicgenre bundle <workdir> <file>",
    )


def fingerprints(store: Store, indices: np.ndarray) -> np.ndarray:
    """Returns the fingerprints of clips, float32 `[n, d]`, computed over their real frames."""
    clips = (store.gather(np.array([i]))[0, : store.lengths[i]] for i in indices)
    return np.stack([fingerprint_spectrogram(clip.astype(np.float32)) for clip in clips])


def compact(prints: np.ndarray) -> np.ndarray:
    """Returns fingerprints `[n, d]` as int8, each scaled to a peak of 127.

    The audit's cosine ignores the scale.
    """
    if prints.dtype == np.int8:
        return prints
    peaks = np.abs(prints).max(axis=1, keepdims=True)
    return np.rint(prints * (127 / np.where(peaks > 0, peaks, 1))).astype(np.int8)


def _fingerprints_in(
    source: Path, wanted: Mapping[tuple[str, str | None], int]
) -> dict[int, np.ndarray]:
    """Returns the fingerprints that a store or bundle has of wanted clips (id and hash), by row."""
    if source.is_file():
        there = TrainedOn.from_arrays(read_bundle_arrays(source)[0], source)
        if there.fingerprints is None:
            return {}
        clips, known = zip(there.clip_ids, there.hashes, strict=True), there.fingerprints
        return {
            wanted[clip]: values.astype(np.float32)
            for clip, values in zip(clips, known, strict=True)
            if clip in wanted
        }
    store = Store.open(source, verify=False)
    clips = zip(store.clip_ids.tolist(), store.hashes.tolist(), strict=True)
    pairs = [(wanted[clip], i) for i, clip in enumerate(clips) if clip in wanted]
    if not pairs:
        return {}
    rows, indices = zip(*pairs, strict=True)
    return dict(zip(rows, fingerprints(store, np.array(indices)), strict=True))
