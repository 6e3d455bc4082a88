"""The effect of changes to clips on a model's decisions, with intervals.

After B. L. Sturm, "A simple method to determine if a music information retrieval system is a
'horse'", IEEE Transactions on Multimedia 16(6), 2014: if a change that is irrelevant to the genre
changes the decision, the model relies on something other than the genre, however high its accuracy.
Sturm also searches such a change for each clip: one that makes a right decision wrong (deflation)
or a wrong one right (inflation). The lowest and the highest accuracy report how far that goes.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.intervals import LEVEL, bootstrap_mean, wilson
from musicgenre.evaluation.render import data_uri, markdown_table, rendered
from musicgenre.files import write_json, write_text

# The two types of changes and their colours.
_TYPES = {
    "irrelevant": (
        "inaudible, or unrelated to the music: level, polarity, start of the clip, tone controls",
        plots.BLUE,
    ),
    "audible": ("audible, but the genre stays the same", plots.ORANGE),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A model's probabilities `[clips, classes]` for the clips after a change.

    `what` says how the change is made, and `irrelevant` that it cannot matter to the genre.
    """

    name: str
    irrelevant: bool
    what: str
    scores: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Robustness:
    """A model's predictions before and after changes. Arrays and lists over clips share one order.

    Attributes:
      facts: what was tested, by name, for people.
      label_names: `[classes]`, in the order of the scores.
      clip_ids: `[clips]`.
      groups: the artist or folder (`group_name`) of each clip, `[clips]`; None if it is not known.
      targets: class numbers `[clips]`, or None if unknown: then there is no accuracy, and the
        decision before the change replaces them where probabilities are compared.
      before: probabilities of the unchanged clips, `[clips, classes]`.
      outcomes: for each change.
      equalised: probabilities under many random equalisers, `[tries, clips, classes]`.
      equaliser: what these are, such as "gains of up to 3 dB per octave band".
      missing: changes that could not be made, dicts with `name` and `reason`.
      skipped: clips that could not be used, dicts with `clip_id`, `path` and `reason`.
      synthetic: the model was trained on synthetic audio, or the clips are synthetic.
    """

    title: str
    facts: Mapping[str, str]
    label_names: Sequence[str]
    clip_ids: Sequence[str]
    groups: Sequence[str | None]
    group_name: str
    targets: np.ndarray | None
    before: np.ndarray
    outcomes: Sequence[Outcome]
    equalised: np.ndarray
    equaliser: str = ""
    missing: Sequence[Mapping[str, str]] = ()
    skipped: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()
    synthetic: bool = False
    command: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def measure(tested: Robustness, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Returns the effect of the changes, as plain JSON values.

    A decision is the most probable label. Each change has `changed` and `share_changed` (with
    Wilson's interval), the clips whose decision changes; `accuracy`, `worse` (clips right before
    and wrong after), `better`, the exact two-sided `p` of these two (McNemar 1947), and
    `accuracy_change` with the bootstrap interval over groups of the paired difference, all None
    without targets; and `probability_change`, the mean change of the true label's probability, with
    such an interval.

    Returns:
      `clips`, `accuracy` (with `accuracy_interval`), `level`, `unit` (what was resampled);
      `transforms`, these rows, irrelevant changes first; `kinds`, for "irrelevant" and "audible":
      `transforms`, `mean_share_changed`, `worst`, `unchanged` (the clips that keep their decision
      under all of them), `right_under_all`; and `equalisers`: `tries`, `changed` (clips whose
      decision one of them changes), and with targets `lowest` (the accuracy where a clip counts if
      it is right before and under all of them) and `highest` (before or under one of them), each
      with Wilson's interval.

    Raises:
      UserError: no clips, or fields that do not fit together.
    """
    _check(tested)
    n, clips = len(tested.clip_ids), np.arange(len(tested.clip_ids))
    groups = tested.groups if any(group is not None for group in tested.groups) else None
    decided = tested.before.argmax(axis=1)
    labelled = tested.targets is not None
    followed = np.asarray(tested.targets) if labelled else decided
    right = decided == followed

    def interval(values: np.ndarray) -> list[float] | None:
        found = bootstrap_mean(values, groups, resamples=resamples, seed=seed)
        return found and list(found)

    def fraction(chosen: np.ndarray) -> dict[str, Any]:
        count = int(chosen.sum())
        return {"count": count, "share": count / n, "interval": list(wilson(count, n))}

    outcomes = sorted(tested.outcomes, key=lambda outcome: not outcome.irrelevant)
    decisions = [outcome.scores.argmax(axis=1) for outcome in outcomes]
    rows: list[dict[str, Any]] = []
    for outcome, after in zip(outcomes, decisions, strict=True):
        changed, correct = fraction(after != decided), after == followed
        worse, better = int((right & ~correct).sum()), int((~right & correct).sum())
        of_labels = {
            "accuracy": float(correct.mean()),
            "accuracy_change": float(correct.mean() - right.mean()),
            "accuracy_change_interval": interval(correct.astype(float) - right),
            "worse": worse,
            "better": better,
            "p": float(stats.binomtest(worse, max(worse + better, 1)).pvalue),
        }
        gained = outcome.scores[clips, followed] - tested.before[clips, followed]
        rows.append(
            {
                "name": outcome.name,
                "kind": "irrelevant" if outcome.irrelevant else "audible",
                "what": outcome.what,
                "changed": changed["count"],
                "share_changed": changed["share"],
                "share_changed_interval": changed["interval"],
                "probability_change": float(gained.mean()),
                "probability_change_interval": interval(gained),
                **(of_labels if labelled else dict.fromkeys(of_labels)),
            }
        )
    kinds = {}
    for name in dict.fromkeys(row["kind"] for row in rows):
        own = [i for i, row in enumerate(rows) if row["kind"] == name]
        after = np.stack([decisions[i] for i in own])
        worst = max((rows[i] for i in own), key=lambda row: row["share_changed"])
        under_all = (right & (after == followed)).all(axis=0)
        kinds[name] = {
            "transforms": len(own),
            "mean_share_changed": float(np.mean([rows[i]["share_changed"] for i in own])),
            "worst": {key: worst[key] for key in ("name", "share_changed")},
            "unchanged": fraction((after == decided).all(axis=0)),
            "right_under_all": fraction(under_all) if labelled else None,
        }
    tries = np.concatenate([decided[None], tested.equalised.argmax(axis=2)])
    return {
        "clips": n,
        "accuracy": float(right.mean()) if labelled else None,
        "accuracy_interval": fraction(right)["interval"] if labelled else None,
        "level": LEVEL,
        "unit": "clip" if groups is None else tested.group_name,
        "transforms": rows,
        "kinds": kinds,
        "equalisers": {
            "tries": len(tested.equalised),
            "equaliser": tested.equaliser,
            "changed": fraction((tries != decided).any(axis=0)),
            "lowest": fraction((tries == followed).all(axis=0)) if labelled else None,
            "highest": fraction((tries == followed).any(axis=0)) if labelled else None,
        },
    }


def headline(measures: Mapping[str, Any]) -> list[str]:
    """Returns the main results from `measure`, one sentence each."""
    n, lines = measures["clips"], []
    if measures["accuracy"] is not None:
        low, high = map(_percent, measures["accuracy_interval"])
        accuracy = _percent(measures["accuracy"])
        lines.append(f"Accuracy on the {n} unchanged clips: {accuracy} %, Wilson {low}-{high}.")
    for name, of in measures["kinds"].items():
        kept, worst, right = of["unchanged"], of["worst"], of["right_under_all"]
        lines.append(
            f"{of['transforms']} {name} changes: {kept['count']} of {n} clips "
            f"({_percent(kept['share'])} %) keep their decision under all of them; the worst, "
            f"{worst['name']}, alters {_percent(worst['share_changed'])} %."
            + (f" Right under all: {_interval(right)}." if right else "")
        )
    searched = measures["equalisers"]
    if searched["tries"]:
        of, low, high = (searched[key] for key in ("changed", "lowest", "highest"))
        lines.append(
            f"{searched['tries']} random equalisers, {searched['equaliser']}: the decision on "
            f"{of['count']} of {n} clips ({_percent(of['share'])} %) changes under one of them."
        )
        if low:
            lines[-1] += (
                " Chosen for each clip, they make the accuracy as low as "
                f"{_interval(low)}, or as high as {_interval(high)}."
            )
    return lines


def write_report(
    out_dir: str | os.PathLike[str], tested: Robustness, measures: Mapping[str, Any]
) -> Path:
    """Writes `robustness.json`, `robustness.md` (returned), `robustness.png` and `report.html`.

    `measures` is the result of `measure`. The folder is created if missing.

    Raises:
      UserError: the folder cannot be written.
    """
    out = Path(out_dir)
    title = ("SYNTHETIC · " if tested.synthetic else "") + tested.title
    fields = ("title", "synthetic", "facts", "notes", "missing", "skipped", "command", "versions")
    saved = {name: getattr(tested, name) for name in fields}
    results = {"headline": headline(measures), "clip_results": _clip_results(tested)}
    write_json(out / "robustness.json", {**saved, **results, **measures})
    plots.save(_figure(measures), out / "robustness.png", title, palette=True)
    columns, rows = _table(measures)
    how = [f"{name.capitalize()}: {what}." for name, (what, _) in _TYPES.items()]
    how += [
        "Worse: clips right before and wrong after; better: the reverse. Each",
        f"{100 * LEVEL:.0f} % interval is for one row: of {len(rows)} rows, about one in twenty",
        "has p < 0.05 by chance.",
    ]
    pages = {"tested": tested, "title": title, "headline": headline(measures), "how": " ".join(how)}
    pages |= {"columns": columns, "rows": rows, "markdown": markdown_table(columns, rows)}
    pages["figure"] = data_uri(out / "robustness.png")
    write_text(out / "report.html", rendered("robustness.html.j2", **pages))
    write_text(out / "robustness.md", rendered("robustness.md.j2", **pages))
    return out / "robustness.md"


def _table(measures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and the rows of the table of changes."""
    labelled = measures["accuracy"] is not None
    columns = ["change", "kind", "decision changed, % (Wilson)"]
    if labelled:
        change = f"change of accuracy (bootstrap by {measures['unit']})"
        columns += ["accuracy after, %", change, "worse / better", "McNemar p"]
    of = "true label" if labelled else "former decision"
    columns.append(f"mean change of p({of}) (bootstrap)")
    rows = []
    for row in measures["transforms"]:
        low, high = map(_percent, row["share_changed_interval"])
        cells = [row["name"], row["kind"], f"{_percent(row['share_changed'])} ({low} to {high})"]
        if labelled:
            cells += [
                _percent(row["accuracy"]),
                _signed(row["accuracy_change"], row["accuracy_change_interval"], 100, 1),
                f"{row['worse']} / {row['better']}",
                f"{row['p']:.2g}" if row["p"] >= 1e-4 else "< 0.0001",
            ]
        cells.append(_signed(row["probability_change"], row["probability_change_interval"], 1, 3))
        rows.append(cells)
    return columns, rows


def _figure(measures: Mapping[str, Any]) -> Figure:
    """Draws the decisions that each change alters, and the change of accuracy or probability."""
    rows, labelled = measures["transforms"], measures["accuracy"] is not None
    colours = [_TYPES[row["kind"]][1] for row in rows]
    # A gap between the two types of changes, which follow each other.
    positions = np.arange(len(rows), dtype=float) + [row["kind"] == "audible" for row in rows]
    figure = plots.new_figure(10.4, 1.9 + 0.24 * (len(rows) + 1))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    limits = 100 * np.array([row["share_changed_interval"] for row in rows])
    left.barh(positions, [100 * row["share_changed"] for row in rows], 0.66, color=colours)
    left.hlines(positions, *limits.T, color=plots.INK, linewidth=1)
    left.set(xlim=(0, max(10.0, 1.12 * limits.max())), ylim=(positions[-1] + 0.7, -0.7))
    left.set_xlabel("clips whose decision changes, % (95 % Wilson)")
    left.set_yticks(positions, [row["name"] for row in rows], fontsize=8.5)
    key, factor = ("accuracy_change", 100) if labelled else ("probability_change", 1)
    ends = [row[f"{key}_interval"] or (np.nan, np.nan) for row in rows]
    right.axvline(0, color=plots.INK, linewidth=1)
    right.hlines(positions, *factor * np.array(ends, float).T, color=colours, linewidth=2)
    means = factor * np.array([row[key] for row in rows])
    right.scatter(means, positions, 25, color=colours, marker="D", edgecolor="white", zorder=3)
    what = "accuracy, points" if labelled else "the former decision's probability"
    right.set_xlabel(f"change of {what} (95 % bootstrap by {measures['unit']})")
    for axes in (left, right):
        plots.style_axes(axes, "x")
    for name, (what, colour) in _TYPES.items():
        left.barh([np.nan], [np.nan], color=colour, label=f"{name}: {what}")
    figure.legend(frameon=False, fontsize=8.5, ncols=1, loc="outside lower left")
    return figure


def _check(tested: Robustness) -> None:
    n, classes = len(tested.clip_ids), len(tested.label_names)
    if not n:
        raise UserError("there is no clip to test.")
    if len(tested.groups) != n or (tested.targets is not None and len(tested.targets) != n):
        raise UserError(f"groups and targets must be given for each of the {n} clips.")
    scores = {"unchanged": tested.before} | {one.name: one.scores for one in tested.outcomes}
    for name, found in [*scores.items(), *(("equalised", one) for one in tested.equalised)]:
        if found.shape != (n, classes):
            shape = list(found.shape)
            raise UserError(f"the scores of the clips ({name}) are {shape}, not {[n, classes]}.")


def _clip_results(tested: Robustness) -> list[dict[str, Any]]:
    """Returns each clip's decision and, by change, the other decision that it leads to."""
    names, decided = tested.label_names, tested.before.argmax(axis=1)
    after = {outcome.name: outcome.scores.argmax(axis=1) for outcome in tested.outcomes}
    return [
        {
            "clip_id": clip_id,
            "group": tested.groups[i],
            "truth": None if tested.targets is None else names[int(tested.targets[i])],
            "decision": names[own],
            "probability": round(float(tested.before[i, own]), 6),
            "changed_by": {
                name: names[other[i]] for name, other in after.items() if other[i] != own
            },
        }
        for i, (clip_id, own) in enumerate(zip(tested.clip_ids, decided, strict=True))
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = map(_percent, found["interval"])
    return f"{_percent(found['share'])} % ({low}-{high})"


def _signed(value: float, interval: Sequence[float] | None, factor: float, digits: int) -> str:
    # A rounded zero has no sign.
    numbers = [factor * number for number in (value, *(interval or ()))]
    texts = [f"{round(number, digits) + 0.0:+.{digits}f}" for number in numbers]
    return texts[0] if interval is None else f"{texts[0]} ({texts[1]} to {texts[2]})"
