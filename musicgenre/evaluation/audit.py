"""Leakage audit: does the evaluated split hold recordings or artists that the model was trained on?"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from musicgenre.errors import UserError

# A fingerprint is a grid of time cells x band cells. Two of them are compared at every shift of up to
# MAX_SHIFT time cells: for a 30 s clip a cell is 0.47 s, so copies are found up to 1.9 s apart.
TIME_CELLS, BAND_CELLS, MAX_SHIFT = 64, 32, 4

# Measured on the 639 GTZAN clips of the fault-filtered train and valid lists: the highest of all 203,841 pairs
# is 0.44 (0.42 between the splits), none of them a copy. Copies with gain, a tilt of 8 dB, 1.5 dB of noise and
# a shift of up to 1.2 s have 0.88 and more; eight clips through a 64 kbit/s MP3 and up to 0.7 s later 0.93 and
# more (through 24 kbit/s, which changes them by 6 to 10 dB, 0.63: those are missed). The threshold lies high
# because drum machines resemble each other more: the closest of 240 different synthetic clips have 0.76.
NEAR_IDENTICAL = 0.8

_PAIRS_PER_BLOCK = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class AuditSide:
    """The clips of one side of the comparison; everything is in the same order.

    Attributes:
      clip_ids: unique ids, `[clips]`; the same id on both sides is taken for the same clip, so prefix them
        with the data set where the sides come from different ones.
      content_hashes: a hash of each sound file or array, `[clips]`; None or "" where there is none.
      groups: the artist or track of each clip, `[clips]`; None where it is not known.
      fingerprints: from `fingerprint_spectrogram`, float32 `[clips, d]`; None leaves that check out.
    """

    clip_ids: Sequence[str]
    content_hashes: Sequence[str | None]
    groups: Sequence[str | None]
    fingerprints: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """An evaluated clip and a clip trained on that should not be in both."""

    evaluated: str
    trained: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of leak.

    Attributes:
      kind: "same clip", "same content", "near-identical" or "same artist" (or what the group is called).
      severity: "same recording" where the model has heard the clip itself, "same artist" where it has heard
        others by the artist.
      pairs: number of pairs of clips, exact.
      clips: number of evaluated clips among them, exact.
      examples: the first pairs, strongest first; of a shared artist one pair for each evaluated clip.
    """

    kind: str
    severity: str
    pairs: int
    clips: int
    examples: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What the audit found. A pair is listed once, under the strongest kind that holds for it.

    Attributes:
      findings: every kind that occurs, worst first; empty if there is none.
      evaluated: number of clips evaluated.
      trained: number of clips trained on.
      unknown_groups: evaluated clips whose artist is not known.
      unknown_groups_trained: clips trained on whose artist is not known.
      without_hash: clips of both sides without a content hash.
      fingerprints_compared: whether spectrograms were compared.
      threshold: the cosine from which two spectrograms count as near-identical.
      closest: the highest cosine between the sides, or None.
      group_name: what a group is, such as "artist".
      unknown: what the model was trained on beside the clips compared, where those clips are not known; "" where all are.
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
        """True where all training clips are known and no check that was made found anything.

        `summary` names the checks that were not made.
        """
        return not self.findings and not self.unknown

    def summary(self) -> list[str]:
        """Returns the result in a few lines for people, what could not be checked included."""
        sides = f"{self.evaluated} evaluated clips against {self.trained} trained on"
        warning = f"training clips unknown: {self.unknown}; whether evaluated clips are among them cannot be said"
        if self.findings:
            lines = [f"LEAK: {sides}", *([warning] if self.unknown else [])]
        elif self.unknown:
            lines = [
                warning,
                *(
                    [f"nothing found among the training clips that are known: {sides}"]
                    if self.trained
                    else []
                ),
            ]
        else:
            lines = [f"no leak found: {sides}"]
        for found in self.findings:
            lines.append(
                f"{found.kind}: {found.clips} of {self.evaluated} evaluated clips "
                f"({found.pairs} pair{'s' if found.pairs != 1 else ''})"
            )
        if self.closest is not None:
            lines.append(
                f"closest spectrograms: cosine {self.closest:.2f} (near-identical from {self.threshold:.2f})"
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
    """Returns a compact description of a clip by which its copies are found.

    The spectrogram is averaged over overlapping cells, 64 in time by 32 in frequency. Each band's mean goes
    (gain and equalisation with it), each band is brought to a similar deviation, then each time's mean goes:
    without that, any two clips that fade in alike look alike.

    Args:
      spectrogram: dB (or MFCCs), `[frames, bands]`, any floating type. Frames at its end that are all the same
        (padding) are left out.

    Returns:
      Unit vector, float32 `[2048]`; zeros for a clip without any change in it, which then is like no other.

    Raises:
      UserError: not two axes, empty, or NaN or infinity in it.
    """
    grid = np.asarray(spectrogram, np.float32)
    if grid.ndim != 2 or 0 in grid.shape:
        raise UserError(f"a spectrogram has the shape [frames, bands], not {list(grid.shape)}.")
    if not np.isfinite(grid).all():
        raise UserError("the spectrogram holds NaN or infinity.")
    # Two short clips that are both padded with silence would look alike for that alone.
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
    """Returns the weights of overlapping triangular averages, `[cells, positions]`, each row summing to 1."""
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
    """Compares the clips evaluated with those trained on.

    Args:
      evaluated: the split whose scores are reported.
      trained: the clips the model was fitted to.
      threshold: cosine from which two fingerprints count as the same recording.
      group_name: what a group is.
      max_examples: pairs listed for each kind; the counts are exact whatever it is.
      unknown: see `AuditResult`.

    Raises:
      UserError: the arrays of a side differ in length, or the fingerprints of the sides in size.
    """
    for name, side in (("evaluated", evaluated), ("trained", trained)):
        _check_side(name, side)
    ours, theirs = evaluated.fingerprints, trained.fingerprints
    if ours is not None and theirs is not None and ours.shape[1] != theirs.shape[1]:
        raise UserError(
            f"the fingerprints of the two sides differ in size: {ours.shape[1]} and {theirs.shape[1]}."
        )

    known: set[tuple[int, int]] = set()
    findings = []

    def add(kind: str, severity: str, pairs: list[tuple[int, int, str]]) -> None:
        if not pairs:
            return
        known.update((i, j) for i, j, _ in pairs)
        examples = [
            Pair(str(evaluated.clip_ids[i]), str(trained.clip_ids[j]), detail)
            for i, j, detail in pairs[:max_examples]
        ]
        findings.append(
            Finding(kind, severity, len(pairs), len({i for i, _, _ in pairs}), tuple(examples))
        )

    recording = "same recording"
    add(
        "same clip",
        recording,
        [(i, j, "") for i, j in _equal(evaluated.clip_ids, trained.clip_ids)],
    )
    same = _equal(evaluated.content_hashes, trained.content_hashes)
    add("same content", recording, [(i, j, "") for i, j in same if (i, j) not in known])
    closest = None
    if ours is not None and theirs is not None:
        close, closest = _near(ours, theirs, threshold)
        add(
            "near-identical",
            recording,
            [(i, j, f"cosine {cosine:.2f}") for i, j, cosine in close if (i, j) not in known],
        )
    if finding := _same_group(evaluated, trained, known, group_name, max_examples):
        findings.append(finding)

    def missing(values: Sequence[str | None]) -> int:
        return sum(not _given(value) for value in values)

    return AuditResult(
        findings=tuple(findings),
        evaluated=len(evaluated.clip_ids),
        trained=len(trained.clip_ids),
        unknown_groups=missing(evaluated.groups),
        unknown_groups_trained=missing(trained.groups),
        without_hash=missing(evaluated.content_hashes) + missing(trained.content_hashes),
        fingerprints_compared=ours is not None and theirs is not None,
        threshold=float(threshold),
        closest=closest,
        group_name=group_name,
        unknown=unknown,
    )


def _given(value: str | None) -> bool:
    return value is not None and value != ""


def _check_side(name: str, side: AuditSide) -> None:
    count = len(side.clip_ids)
    lengths = {"content_hashes": len(side.content_hashes), "groups": len(side.groups)}
    if side.fingerprints is not None:
        if np.ndim(side.fingerprints) != 2:
            raise UserError(
                f"{name}: fingerprints must have the shape [clips, d], not {list(np.shape(side.fingerprints))}."
            )
        lengths["fingerprints"] = len(side.fingerprints)
    for field, length in lengths.items():
        if length != count:
            raise UserError(f"{name}: {count} clip ids but {length} {field}.")


def _positions(values: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if value is not None and value != "":
            found[value].append(index)
    return found


def _equal(left: Sequence[Hashable], right: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Returns the index pairs of equal values, those that are not given left out."""
    where = _positions(right)
    return [
        (i, j)
        for value, rows in _positions(left).items()
        for i in rows
        for j in where.get(value, ())
    ]


def _same_group(
    evaluated: AuditSide,
    trained: AuditSide,
    known: set[tuple[int, int]],
    group_name: str,
    max_examples: int,
) -> Finding | None:
    """Counts pairs of one group; there can be very many, so only one for each evaluated clip is kept."""
    where = _positions(trained.groups)
    pairs, examples = 0, []
    for i, group in enumerate(evaluated.groups):
        others = [j for j in where.get(group, ()) if (i, j) not in known]
        if others:
            pairs += len(others)
            examples.append(
                Pair(
                    str(evaluated.clip_ids[i]),
                    str(trained.clip_ids[others[0]]),
                    f"{group_name} {group}, {len(others)} training clips",
                )
            )
    if not examples:
        return None
    kind = f"same {group_name}"
    return Finding(kind, kind, pairs, len(examples), tuple(examples[:max_examples]))


def _near(
    left: np.ndarray, right: np.ndarray, threshold: float
) -> tuple[list[tuple[int, int, float]], float | None]:
    """Returns (i, j, cosine) of the pairs from the threshold on, closest first, and the highest of all."""
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
    return sorted(found, key=lambda pair: (-pair[2], pair)), closest


def _comparison(right: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from fingerprints `[n, d]` to their highest cosines over all shifts `[n, right]`.

    Fingerprints that are not grids of `fingerprint_spectrogram`'s size are compared without a shift.
    """
    if right.shape[1] == TIME_CELLS * BAND_CELLS:
        shifts = [step * BAND_CELLS for step in range(-MAX_SHIFT, MAX_SHIFT + 1)]
    else:
        shifts = [0]
    size = right.shape[1]

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
