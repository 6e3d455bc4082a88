"""Leakage audit: was the model trained on recordings or artists of the evaluated split?"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from musicgenre.errors import UserError

# A fingerprint is a grid of time cells x band cells. Two of them are compared at every shift of up
# to MAX_SHIFT time cells: for a 30 s clip a cell is 0.47 s, so copies are found up to 1.9 s apart.
TIME_CELLS, BAND_CELLS, MAX_SHIFT = 64, 32, 4

# Measured on the 639 GTZAN clips of the fault-filtered train and valid lists, none a copy: the
# highest cosine of all 203,841 pairs is 0.44. Copies with gain, a tilt of 8 dB, 1.5 dB of noise and
# a shift of up to 1.2 s have 0.88 and more; eight clips through a 64 kbit/s MP3 and moved by up to
# 0.7 s have 0.93 and more (through 24 kbit/s 0.63: those are missed). The threshold is high
# because drum machines resemble each other: the closest of 240 synthetic clips have 0.76.
NEAR_IDENTICAL = 0.8

_PAIRS_PER_BLOCK = 4_000_000
_Pairs = list[tuple[int, int, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class AuditSide:
    """The clips of one side of the comparison, in the same order in every field.

    Attributes:
      clip_ids: unique ids, `[clips]`. The same id on both sides means the same clip, so prefix them
        with the data set if the sides come from different ones.
      content_hashes: a hash of each sound file or array, `[clips]`; None or "" if there is none.
      groups: the artist or track of each clip, `[clips]`; None if unknown.
      fingerprints: from `fingerprint_spectrogram`, float32 `[clips, d]`; None skips this check.
    """

    clip_ids: Sequence[str]
    content_hashes: Sequence[str | None]
    groups: Sequence[str | None]
    fingerprints: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """An evaluated clip and a training clip that should not be in both sides."""

    evaluated: str
    trained: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One type of leak.

    Attributes:
      kind: "same clip", "same content", "near-identical" or "same artist" (or the group's name).
      severity: "same recording" if the model was trained on the clip itself, "same artist" if it
        was trained on other clips by the artist.
      pairs: exact number of pairs of clips.
      clips: exact number of evaluated clips among them.
      examples: the first pairs, strongest first; for a shared artist one per evaluated clip.
    """

    kind: str
    severity: str
    pairs: int
    clips: int
    examples: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """The audit's findings. A pair is listed once, under the strongest type that applies.

    Attributes:
      findings: every type that occurs, worst first.
      evaluated: number of evaluated clips.
      trained: number of training clips.
      unknown_groups: evaluated clips whose artist is unknown.
      unknown_groups_trained: training clips whose artist is unknown.
      without_hash: clips of both sides without a content hash.
      fingerprints_compared: whether spectrograms were compared.
      threshold: the cosine from which two spectrograms count as near-identical.
      closest: the highest cosine between the sides, or None.
      group_name: the meaning of a group, such as "artist".
      unknown: whose training clips are unknown; "" if all are known.
    """

    findings: tuple[Finding, ...]
    evaluated: int
    trained: int
    unknown_groups: int
    unknown_groups_trained: int
    without_hash: int
    fingerprints_compared: bool
    threshold: float
    closest: float | None
    group_name: str
    unknown: str = ""

    @property
    def clean(self) -> bool:
        """Whether all training clips are known and no check found anything.

        `summary` names the checks that were not made.
        """
        return not self.findings and not self.unknown

    def summary(self) -> list[str]:
        """Returns the result in a few lines for people, including what could not be checked."""
        sides = f"{self.evaluated} evaluated clips against {self.trained} trained on"
        warning = f"training clips unknown: {self.unknown}; leakage cannot be ruled out"
        if self.findings:
            lines = [f"LEAK: {sides}"] + [warning] * bool(self.unknown)
        elif self.unknown:
            known = f"nothing found among the training clips that are known: {sides}"
            lines = [warning] + [known] * bool(self.trained)
        else:
            lines = [f"no leak found: {sides}"]
        for found in self.findings:
            plural = "s" if found.pairs != 1 else ""
            lines.append(
                f"{found.kind}: {found.clips} of {self.evaluated} evaluated clips "
                f"({found.pairs} pair{plural})"
            )
        if self.closest is not None:
            lines.append(
                f"closest spectrograms: cosine {self.closest:.2f} "
                f"(near-identical from {self.threshold:.2f})"
            )
        if self.unknown and not self.trained:
            return lines
        if not self.fingerprints_compared:
            lines.append("spectrograms not compared: no fingerprints")
        if self.without_hash:
            lines.append(f"content not compared for {self.without_hash} clips without a hash")
        for unknown, total, side in (
            (self.unknown_groups, self.evaluated, "evaluated"),
            (self.unknown_groups_trained, self.trained, "training"),
        ):
            if unknown:
                lines.append(f"{self.group_name} unknown for {unknown} of {total} {side} clips")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {**dataclasses.asdict(self), "clean": self.clean, "summary": self.summary()}


def fingerprint_spectrogram(spectrogram: np.ndarray) -> np.ndarray:
    """Returns a compact description of a clip that identifies its copies.

    The spectrogram is averaged over overlapping cells, 64 in time by 32 in frequency. Subtracting
    each band's mean removes gain and equalisation, and each band is scaled to a similar standard
    deviation. Subtracting each time's mean keeps clips that fade in alike from looking alike.

    Args:
      spectrogram: dB (or MFCCs), `[frames, bands]`, any floating type. Identical frames at its end
        (padding) are ignored.

    Returns:
      Unit vector, float32 `[2048]`; zeros for a constant clip, which then matches no other.

    Raises:
      UserError: it has not two axes, is empty, or holds NaN or infinity.
    """
    grid = np.asarray(spectrogram, np.float32)
    if grid.ndim != 2 or 0 in grid.shape:
        raise UserError(f"a spectrogram has the shape [frames, bands], not {list(grid.shape)}.")
    if not np.isfinite(grid).all():
        raise UserError("the spectrogram holds NaN or infinity.")
    # Padding with silence would make two short clips look alike.
    changes = np.flatnonzero((grid != grid[-1]).any(axis=1))
    if len(changes) and changes[-1] + 2 < len(grid):
        grid = grid[: changes[-1] + 1]
    frames, bands = grid.shape
    grid = _cells(frames, TIME_CELLS, overlap=2.0) @ grid @ _cells(bands, BAND_CELLS, overlap=1.0).T
    grid = grid - grid.mean(axis=0)
    grid = grid / (grid.std(axis=0) + 1)  # the 1 dB keeps a silent band's rounding noise small
    grid = grid - grid.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(grid)
    if norm < 1e-3:
        return np.zeros(grid.size, np.float32)
    return (grid / norm).astype(np.float32).ravel()


def _cells(positions: int, cells: int, overlap: float) -> np.ndarray:
    """Returns overlapping triangular averages, `[cells, positions]`, each row summing to 1."""
    width = positions / cells
    centres = (np.arange(cells) + 0.5) * width
    distance = np.abs(np.arange(positions) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distance / (max(width, 1) * overlap))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def audit(
    evaluated: AuditSide,
    trained: AuditSide,
    *,
    threshold: float = NEAR_IDENTICAL,
    group_name: str = "artist",
    max_examples: int = 50,
    unknown: str = "",
) -> AuditResult:
    """Compares evaluated clips with training clips.

    Args:
      evaluated: the split whose scores are reported.
      trained: the clips that the model was trained on.
      threshold: cosine from which two fingerprints count as the same recording.
      group_name: the meaning of a group.
      max_examples: pairs listed per type; the counts are always exact.
      unknown: see `AuditResult`.

    Raises:
      UserError: the arrays of a side differ in length, or the fingerprints of the sides in size.
    """
    for name, side in (("evaluated", evaluated), ("trained", trained)):
        _check_side(name, side)
    ours, theirs = evaluated.fingerprints, trained.fingerprints
    close: _Pairs = []
    closest = None
    compared = ours is not None and theirs is not None
    if ours is not None and theirs is not None:
        if ours.shape[1] != theirs.shape[1]:
            raise UserError(
                "the fingerprints of the two sides differ in size: "
                f"{ours.shape[1]} and {theirs.shape[1]}."
            )
        close, closest = _near(ours, theirs, threshold)
    known: set[tuple[int, int]] = set()
    findings = []
    for kind, pairs in (
        ("same clip", _equal(evaluated.clip_ids, trained.clip_ids)),
        ("same content", _equal(evaluated.content_hashes, trained.content_hashes)),
        ("near-identical", close),
    ):
        if new := [pair for pair in pairs if pair[:2] not in known]:
            known.update((i, j) for i, j, _ in new)
            examples = tuple(
                Pair(str(evaluated.clip_ids[i]), str(trained.clip_ids[j]), detail)
                for i, j, detail in new[:max_examples]
            )
            clips = len({i for i, _, _ in new})
            findings.append(Finding(kind, "same recording", len(new), clips, examples))
    if finding := _same_group(evaluated, trained, known, group_name, max_examples):
        findings.append(finding)

    def missing(values: Sequence[str | None]) -> int:
        return sum(value is None or value == "" for value in values)

    return AuditResult(
        findings=tuple(findings),
        evaluated=len(evaluated.clip_ids),
        trained=len(trained.clip_ids),
        unknown_groups=missing(evaluated.groups),
        unknown_groups_trained=missing(trained.groups),
        without_hash=missing(evaluated.content_hashes) + missing(trained.content_hashes),
        fingerprints_compared=compared,
        threshold=float(threshold),
        closest=closest,
        group_name=group_name,
        unknown=unknown,
    )


def _check_side(name: str, side: AuditSide) -> None:
    count = len(side.clip_ids)
    lengths = {"content_hashes": len(side.content_hashes), "groups": len(side.groups)}
    if side.fingerprints is not None:
        if np.ndim(side.fingerprints) != 2:
            shape = list(np.shape(side.fingerprints))
            raise UserError(f"{name}: fingerprints must have the shape [clips, d], not {shape}.")
        lengths["fingerprints"] = len(side.fingerprints)
    for field, length in lengths.items():
        if length != count:
            raise UserError(f"{name}: {count} clip ids but {length} {field}.")


def _positions(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Returns the positions of every value, without None and ""."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if value is not None and value != "":
            found[value].append(index)
    return found


def _equal(left: Sequence[Hashable], right: Sequence[Hashable]) -> _Pairs:
    """Returns the index pairs of equal values, each with an empty detail."""
    there = _positions(right)
    return [
        (i, j, "")
        for value, rows in _positions(left).items()
        for i, j in itertools.product(rows, there.get(value, ()))
    ]


def _same_group(
    evaluated: AuditSide,
    trained: AuditSide,
    known: set[tuple[int, int]],
    group_name: str,
    max_examples: int,
) -> Finding | None:
    """Counts the pairs of one group, with one example per evaluated clip."""
    there = _positions(trained.groups)
    pairs, examples = 0, []
    for i, group in enumerate(evaluated.groups):
        if others := [j for j in there.get(group, ()) if (i, j) not in known]:
            pairs += len(others)
            detail = f"{group_name} {group}, {len(others)} training clips"
            ids = str(evaluated.clip_ids[i]), str(trained.clip_ids[others[0]])
            examples.append(Pair(*ids, detail))
    if not examples:
        return None
    kind = f"same {group_name}"
    return Finding(kind, kind, pairs, len(examples), tuple(examples[:max_examples]))


def _near(left: np.ndarray, right: np.ndarray, threshold: float) -> tuple[_Pairs, float | None]:
    """Returns the pairs from the threshold on, closest first, and the highest cosine of all."""
    if len(left) == 0 or len(right) == 0:
        return [], None
    found: list[tuple[int, int, float]] = []
    closest = -1.0
    rows = max(1, _PAIRS_PER_BLOCK // len(right))
    compare = _comparison(right)
    for start in range(0, len(left), rows):
        cosines = compare(left[start : start + rows])
        closest = max(closest, float(cosines.max()))
        near = np.argwhere(cosines >= threshold)
        found += [(start + int(i), int(j), round(float(cosines[i, j]), 4)) for i, j in near]
    found.sort(key=lambda pair: (-pair[2], pair))
    return [(i, j, f"cosine {cosine:.2f}") for i, j, cosine in found], closest


def _comparison(right: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from fingerprints `[n, d]` to their highest cosines over shifts.

    The cosines have the shape `[n, right]`. Fingerprints of another size than
    `fingerprint_spectrogram`'s are compared without shifts.
    """
    size = right.shape[1]
    most = MAX_SHIFT if size == TIME_CELLS * BAND_CELLS else 0
    shifts = [step * BAND_CELLS for step in range(-most, most + 1)]

    def overlap(rows: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
        part = rows[:, max(shift, 0) : size - max(-shift, 0)]
        norms = np.linalg.norm(part, axis=1)
        return part, np.where(norms > 0, norms, 1)

    moved = [overlap(right, -shift) for shift in shifts]

    def compare(left: np.ndarray) -> np.ndarray:
        best = np.full((len(left), len(right)), -1, np.float32)
        for shift, (others, norms) in zip(shifts, moved, strict=True):
            part, own_norms = overlap(left, shift)
            np.maximum(best, (part / own_norms[:, None]) @ others.T / norms, out=best)
        return best

    return compare
