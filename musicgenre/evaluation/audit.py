"""Leakage audit: was the model trained on recordings or artists of the evaluated split?"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from musicgenre.errors import UserError

# A fingerprint is a grid of time cells x band cells. Two of them are compared at every shift of up
# to MAX_SHIFT time cells: for a 30 s clip a cell is 0.47 s, so copies are found up to 1.9 s apart.
TIME_CELLS, BAND_CELLS, MAX_SHIFT = 64, 32, 4

# Among the 639 GTZAN clips of the fault-filtered train and valid lists the highest cosine is 0.44.
# Copies with gain, a tilt of 8 dB, 1.5 dB of noise and a shift of up to 1.2 s have 0.88 and more;
# clips through a 64 kbit/s MP3 and moved by up to 0.7 s 0.93 and more (through 24 kbit/s 0.63:
# those are missed). Different clips with drum machines reach 0.76.
NEAR_IDENTICAL = 0.8

# Pairs listed per type of leak; the counts are always exact.
MAX_EXAMPLES = 50
_PAIRS_PER_BLOCK = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class AuditSide:
    """The clips of one side of the comparison, in the same order in every field.

    Attributes:
      clip_ids: unique ids, `[clips]`; the same id on both sides means the same clip.
      content_hashes: a hash of each sound file or array, `[clips]`; None or "" if there is none.
      groups: the artist or track of each clip, `[clips]`; None if unknown.
      fingerprints: from `fingerprint_spectrogram`, float32 `[clips, 2048]`; None skips this check.

    Raises:
      UserError: the fields differ in length, or the fingerprints have another shape.
    """

    clip_ids: Sequence[str]
    content_hashes: Sequence[str | None]
    groups: Sequence[str | None]
    fingerprints: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.clip_ids)
        for field in ("content_hashes", "groups"):
            if (length := len(getattr(self, field))) != count:
                raise UserError(f"audit: {count} clip ids but {length} {field}.")
        wanted = (count, TIME_CELLS * BAND_CELLS)
        if self.fingerprints is not None and np.shape(self.fingerprints) != wanted:
            shape = np.shape(self.fingerprints)
            raise UserError(f"audit: fingerprints must have the shape {wanted}, not {shape}.")


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
      severity: "same recording", or "same artist" for other clips by the artist.
      pairs, clips: exact numbers of pairs, and of evaluated clips among them.
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
      evaluated, trained: numbers of clips.
      unknown_groups, unknown_groups_trained: clips of each side whose artist is unknown.
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
        """Whether all training clips are known and no check found anything."""
        return not self.findings and not self.unknown

    def summary(self) -> list[str]:
        """Returns the result in a few lines for people, including what could not be checked."""
        sides = f"{self.evaluated} evaluated clips against {self.trained} trained on"
        lines = [f"LEAK: {sides}"] if self.findings else []
        if self.unknown:
            lines.append(f"training clips unknown: {self.unknown}; leakage cannot be ruled out")
        if not self.findings and (self.trained or not self.unknown):
            known = "nothing found among the training clips that are known"
            lines.append(f"{known if self.unknown else 'no leak found'}: {sides}")
        for found in self.findings:
            pairs = f"{found.pairs} pair{'s' if found.pairs != 1 else ''}"
            lines.append(
                f"{found.kind}: {found.clips} of {self.evaluated} evaluated clips ({pairs})"
            )
        if self.closest is not None:
            cosines = f"{self.closest:.2f} (near-identical from {self.threshold:.2f})"
            lines.append(f"closest spectrograms: cosine {cosines}")
        if self.unknown and not self.trained:
            return lines
        if not self.fingerprints_compared:
            lines.append("spectrograms not compared: no fingerprints")
        if self.without_hash:
            lines.append(f"content not compared for {self.without_hash} clips without a hash")
        for count, side in (
            (self.unknown_groups, f"{self.evaluated} evaluated"),
            (self.unknown_groups_trained, f"{self.trained} training"),
        ):
            if count:
                lines.append(f"{self.group_name} unknown for {count} of {side} clips")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {**dataclasses.asdict(self), "clean": self.clean, "summary": self.summary()}


def fingerprint_spectrogram(spectrogram: np.ndarray) -> np.ndarray:
    """Returns a clip's fingerprint, a unit vector, float32 `[2048]`, that identifies its copies.

    The spectrogram is averaged over overlapping cells, 64 in time by 32 in frequency. Subtracting
    each band's mean removes gain and equalisation, and each band is scaled to a similar standard
    deviation. Subtracting each time's mean keeps clips that fade in alike from looking alike.
    A constant clip has zeros, which match nothing.

    Args:
      spectrogram: dB (or MFCCs), `[frames, bands]`, any floating type. Identical frames at its end
        (padding) are ignored.

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
    return (grid / norm if norm >= 1e-3 else np.zeros_like(grid)).astype(np.float32).ravel()


def _cells(positions: int, cells: int, overlap: float) -> np.ndarray:
    """Returns overlapping triangular averages, `[cells, positions]`, each row summing to 1."""
    width = positions / cells
    centres = (np.arange(cells) + 0.5) * width
    distance = np.abs(np.arange(positions) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distance / (max(width, 1) * overlap))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def audit(
    evaluated: AuditSide, trained: AuditSide, *, group_name: str = "artist", unknown: str = ""
) -> AuditResult:
    """Compares the clips of an evaluated split with those that a model was trained on.

    See `AuditResult` for `group_name` and `unknown`.
    """
    known: set[tuple[int, int]] = set()
    findings = []

    def pair(i: int, j: int, detail: str = "") -> Pair:
        return Pair(str(evaluated.clip_ids[i]), str(trained.clip_ids[j]), detail)

    close: list[tuple[int, int, str]] = []
    closest = None
    if compared := evaluated.fingerprints is not None and trained.fingerprints is not None:
        close, closest = _near(evaluated.fingerprints, trained.fingerprints)
    ids = _equal(evaluated.clip_ids, trained.clip_ids)
    contents = _equal(evaluated.content_hashes, trained.content_hashes)
    for kind, pairs in (
        ("same clip", [(i, j, "") for i, others in ids for j in others]),
        ("same content", [(i, j, "") for i, others in contents for j in others]),
        ("near-identical", close),
    ):
        if new := [found for found in pairs if found[:2] not in known]:
            known.update((i, j) for i, j, _ in new)
            clips, first = len({i for i, _, _ in new}), new[:MAX_EXAMPLES]
            examples = tuple(pair(*found) for found in first)
            findings.append(Finding(kind, "same recording", len(new), clips, examples))
    count, shared = 0, []
    for i, others in _equal(evaluated.groups, trained.groups):
        if left := [j for j in others if (i, j) not in known]:
            count += len(left)
            detail = f"{group_name} {evaluated.groups[i]}, {len(left)} training clips"
            shared.append(pair(i, left[0], detail))
    if shared:
        kind = f"same {group_name}"
        findings.append(Finding(kind, kind, count, len(shared), tuple(shared[:MAX_EXAMPLES])))

    def missing(values: Sequence[str | None]) -> int:
        return sum(not value for value in values)

    return AuditResult(
        findings=tuple(findings),
        evaluated=len(evaluated.clip_ids),
        trained=len(trained.clip_ids),
        unknown_groups=missing(evaluated.groups),
        unknown_groups_trained=missing(trained.groups),
        without_hash=missing(evaluated.content_hashes) + missing(trained.content_hashes),
        fingerprints_compared=compared,
        threshold=NEAR_IDENTICAL,
        closest=closest,
        group_name=group_name,
        unknown=unknown,
    )


def _equal(left: Sequence[str | None], right: Sequence[str | None]) -> list[tuple[int, list[int]]]:
    """Returns each left position with the right positions that have the same known value."""
    there: dict[str, list[int]] = defaultdict(list)
    for j, value in enumerate(right):
        if value:
            there[value].append(j)
    return [(i, there[value]) for i, value in enumerate(left) if value and value in there]


def _near(left: np.ndarray, right: np.ndarray) -> tuple[list[tuple[int, int, str]], float | None]:
    """Returns the near-identical pairs, closest first, and the highest cosine of all pairs."""
    if not len(left) or not len(right):
        return [], None
    shifts = [step * BAND_CELLS for step in range(-MAX_SHIFT, MAX_SHIFT + 1)]
    moved = [_overlap(right, -shift) for shift in shifts]
    found: list[tuple[int, int, float]] = []
    closest = -1.0
    rows = max(1, _PAIRS_PER_BLOCK // len(right))
    for start in range(0, len(left), rows):
        block = left[start : start + rows]
        cosines = np.full((len(block), len(right)), -1, np.float32)
        for shift, (others, norms) in zip(shifts, moved, strict=True):
            part, own_norms = _overlap(block, shift)
            np.maximum(cosines, (part / own_norms[:, None]) @ others.T / norms, out=cosines)
        closest = max(closest, float(cosines.max()))
        near = np.argwhere(cosines >= NEAR_IDENTICAL)
        found += [(start + int(i), int(j), round(float(cosines[i, j]), 4)) for i, j in near]
    found.sort(key=lambda pair: (-pair[2], pair))
    return [(i, j, f"cosine {cosine:.2f}") for i, j, cosine in found], closest


def _overlap(rows: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the columns that remain after a shift, and the norms of the rows."""
    part = rows[:, max(shift, 0) : rows.shape[1] - max(-shift, 0)]
    norms = np.linalg.norm(part, axis=1)
    return part, np.where(norms > 0, norms, 1)
