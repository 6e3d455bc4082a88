"""What changes of a clip do to a model's answers, with intervals: a table, a picture, JSON and one self-contained HTML page.

After B. L. Sturm, "A simple method to determine if a music information retrieval system is a 'horse'", IEEE Transactions on
Multimedia 16(6), 2014: where a change that has nothing to do with the genre changes the answer, the model goes by something else
than the genre, however good its accuracy is. Sturm also looks for such a change for each clip: one that makes a right answer
wrong (deflation) or a wrong one right (inflation). How far that takes the accuracy is reported as the lowest and the highest.
"""

import base64
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from musicgenre.errors import UserError
from musicgenre.evaluation import plots
from musicgenre.evaluation.intervals import bootstrap_mean, wilson
from musicgenre.evaluation.report import LEVEL, rendered
from musicgenre.files import write_json, write_text

# What the two kinds of changes are called, and what they are.
KINDS = {
    True: (
        "irrelevant",
        "not noticed, or nothing to do with the music: level, polarity, where the clip begins, tone controls",
    ),
    False: ("audible", "heard, and the genre stays"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a model says of the changed clips.

    Attributes:
      name: of the change, such as "tempo +2 %".
      irrelevant: which of the two kinds it is, see `KINDS`.
      what: how it is made.
      scores: probabilities, `[clips, classes]`.
    """

    name: str
    irrelevant: bool
    what: str
    scores: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Robustness:
    """What a model says of clips before and after changes. Arrays and lists over clips share one order.

    Attributes:
      title: heading of the report.
      facts: what was tested, by name, for people.
      label_names: `[classes]`, in the order of the scores.
      clip_ids: `[clips]`.
      groups: the artist or folder of each clip, `[clips]`; None where it is not known.
      group_name: what a group is.
      targets: class numbers `[clips]`, or None where they are not known: then the decision before the change stands for them
        where probabilities are compared, and there is no accuracy.
      before: probabilities of the clips as they are, `[clips, classes]`.
      outcomes: for each change.
      equalised: probabilities under many random equalisers, `[tries, clips, classes]`.
      equaliser: what these are, such as "gains of up to 3 dB an octave band".
      missing: changes that could not be made, dicts with `name` and `reason`.
      skipped: clips that could not be used, dicts with `clip_id`, `path` and `reason`.
      notes: sentences below the headline.
      synthetic: the model learnt from made-up sound, or the clips are.
      command: what was typed.
      versions: version by package.
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
    """Returns what the changes do, as plain JSON values.

    A decision is the most probable label. Of each change: `changed` and `share_changed` (with Wilson's interval), the clips whose
    decision becomes another one; `accuracy`, `worse` (clips right before and wrong after), `better`, the exact two-sided `p` of
    these two (McNemar 1947), and `accuracy_change` with the bootstrap interval over groups of the paired difference, all None
    without targets; `probability_change`, the mean change of the probability of the true label, with such an interval.

    Args:
      tested: what the model said.
      resamples: draws of the bootstraps.
      seed: of the bootstraps.

    Returns:
      `clips`, `accuracy` (with `accuracy_interval`), `level`, `unit` (what was resampled); `transforms`, these rows, irrelevant
      changes first; `kinds`, for "irrelevant" and "audible": `transforms`, `mean_share_changed`, `worst`, `unchanged` (the clips
      that keep their decision under all of them), `right_under_all`; and `equalisers`: `tries`, `changed` (clips whose decision
      one of them changes), and with targets `lowest` (accuracy where a clip counts when it is right before and under all of
      them) and `highest` (before or under one of them), each with Wilson's interval.

    Raises:
      UserError: no clips, or fields that do not fit together.
    """
    _check(tested)
    n = len(tested.clip_ids)
    groups = tested.groups if any(group is not None for group in tested.groups) else None
    targets = None if tested.targets is None else np.asarray(tested.targets)
    decided = tested.before.argmax(axis=1)
    # Where the truth is not known, the probability of what was decided before is followed.
    followed = decided if targets is None else targets
    right = None if targets is None else decided == targets

    def interval(values: np.ndarray) -> list[float] | None:
        found = bootstrap_mean(values, groups, resamples=resamples, seed=seed, level=LEVEL)
        return None if found is None else list(found)

    def share(count: int) -> dict[str, Any]:
        return {
            "count": int(count),
            "share": int(count) / n,
            "interval": list(wilson(int(count), n, LEVEL)),
        }

    rows, changed_by, right_by = [], [], []
    outcomes = sorted(tested.outcomes, key=lambda outcome: not outcome.irrelevant)
    for outcome in outcomes:
        after = outcome.scores.argmax(axis=1)
        changed = after != decided
        gained = outcome.scores[np.arange(n), followed] - tested.before[np.arange(n), followed]
        row: dict[str, Any] = {
            "name": outcome.name,
            "kind": KINDS[outcome.irrelevant][0],
            "what": outcome.what,
            "changed": int(changed.sum()),
            "share_changed": float(changed.mean()),
            "share_changed_interval": list(wilson(int(changed.sum()), n, LEVEL)),
            "probability_change": float(gained.mean()),
            "probability_change_interval": interval(gained),
        }
        for name in (
            "accuracy",
            "accuracy_change",
            "accuracy_change_interval",
            "worse",
            "better",
            "p",
        ):
            row[name] = None
        if right is not None:
            correct = after == targets
            worse, better = int((right & ~correct).sum()), int((~right & correct).sum())
            row |= {
                "accuracy": float(correct.mean()),
                "accuracy_change": float(correct.mean() - right.mean()),
                "accuracy_change_interval": interval(correct.astype(float) - right),
                "worse": worse,
                "better": better,
                "p": float(stats.binomtest(worse, worse + better).pvalue)
                if worse + better
                else 1.0,
            }
            right_by.append(correct)
        rows.append(row)
        changed_by.append(changed)
    kinds = {}
    for irrelevant, (name, _) in KINDS.items():
        own = [i for i, outcome in enumerate(outcomes) if outcome.irrelevant == irrelevant]
        if not own:
            continue
        worst = max(own, key=lambda i: rows[i]["share_changed"])
        kinds[name] = {
            "transforms": len(own),
            "mean_share_changed": float(np.mean([rows[i]["share_changed"] for i in own])),
            "worst": {"name": rows[worst]["name"], "share_changed": rows[worst]["share_changed"]},
            "unchanged": share((~np.any([changed_by[i] for i in own], axis=0)).sum()),
            "right_under_all": None
            if right is None
            else share((right & np.all([right_by[i] for i in own], axis=0)).sum()),
        }
    return {
        "clips": n,
        "accuracy": None if right is None else float(right.mean()),
        "accuracy_interval": None if right is None else list(wilson(int(right.sum()), n, LEVEL)),
        "level": LEVEL,
        "unit": "clip" if groups is None else tested.group_name,
        "transforms": rows,
        "kinds": kinds,
        "equalisers": _searched(tested, decided, targets, share),
    }


def headline(measures: Mapping[str, Any]) -> list[str]:
    """Returns what matters most, a sentence each.

    Args:
      measures: from `measure`.
    """
    n = measures["clips"]
    lines = []
    if measures["accuracy"] is not None:
        low, high = measures["accuracy_interval"]
        lines.append(
            f"Accuracy on the {n} clips as they are: {_percent(measures['accuracy'])} %, Wilson {_percent(low)}-{_percent(high)}."
        )
    for name, of in measures["kinds"].items():
        kept, worst = of["unchanged"], of["worst"]
        line = f"{of['transforms']} {name} changes: {kept['count']} of {n} clips ({_percent(kept['share'])} %) keep their decision"
        line += f" under all of them; the worst, {worst['name']}, alters {_percent(worst['share_changed'])} %"
        if of["right_under_all"]:
            line += f". Right under all: {_interval(of['right_under_all'])}"
        lines.append(line + ".")
    searched = measures["equalisers"]
    if searched["tries"]:
        of = searched["changed"]
        line = f"{searched['tries']} random equalisers, {searched['equaliser']}: the decision on {of['count']} of {n} clips "
        line += f"({_percent(of['share'])} %) changes under one of them"
        if searched["lowest"]:
            line += f". Chosen for each clip, they make the accuracy as low as {_interval(searched['lowest'])}, "
            line += f"or as high as {_interval(searched['highest'])}"
        lines.append(line + ".")
    return lines


def write_report(
    out_dir: str | os.PathLike[str],
    tested: Robustness,
    *,
    measures: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes `robustness.json`, `robustness.md`, `robustness.png` and `report.html`.

    Args:
      out_dir: folder; made where it is missing.
      tested: what the model said.
      measures: what `measure` returned for it; measured here if None.
      seed: of the bootstraps.

    Returns:
      The path of `robustness.md`.

    Raises:
      UserError: what `measure` raises, or the folder cannot be written.
    """
    out = Path(out_dir)
    measures = measure(tested, seed=seed) if measures is None else measures
    title = ("SYNTHETIC · " if tested.synthetic else "") + tested.title
    write_json(
        out / "robustness.json",
        {
            "title": tested.title,
            "synthetic": tested.synthetic,
            "facts": dict(tested.facts),
            "headline": headline(measures),
            **measures,
            "notes": list(tested.notes),
            "missing": [dict(row) for row in tested.missing],
            "skipped": [dict(row) for row in tested.skipped],
            "clip_results": _clip_results(tested),
            "command": tested.command,
            "versions": dict(tested.versions),
        },
    )
    flips_plot(out / "robustness.png", measures, title)
    columns, rows = table(measures)
    write_text(out / "robustness.md", _markdown(tested, measures, title, columns, rows))
    page = rendered(
        "robustness.html.j2",
        tested=tested,
        title=title,
        headline=headline(measures),
        kinds=KINDS.values(),
        columns=columns,
        rows=rows,
        how=_how(measures),
        figure="data:image/png;base64,"
        + base64.b64encode((out / "robustness.png").read_bytes()).decode(),
    )
    write_text(out / "report.html", page)
    return out / "robustness.md"


def table(measures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows, as text, that the reports show: one for each change.

    Args:
      measures: from `measure`.
    """
    labelled = measures["accuracy"] is not None
    of = "true label" if labelled else "former decision"
    columns = ["change", "kind", "decision changed, % (Wilson)"]
    if labelled:
        columns += [
            "accuracy after, %",
            f"change of accuracy (bootstrap by {measures['unit']})",
            "worse / better",
            "McNemar p",
        ]
    columns.append(f"mean change of p({of}) (bootstrap)")
    rows = []
    for row in measures["transforms"]:
        low, high = row["share_changed_interval"]
        cells = [
            row["name"],
            row["kind"],
            f"{_percent(row['share_changed'])} ({_percent(low)} to {_percent(high)})",
        ]
        if labelled:
            cells += [
                _percent(row["accuracy"]),
                _signed(100 * row["accuracy_change"], row["accuracy_change_interval"], 100, 1),
                f"{row['worse']} / {row['better']}",
                f"{row['p']:.2g}" if row["p"] >= 1e-4 else "< 0.0001",
            ]
        cells.append(_signed(row["probability_change"], row["probability_change_interval"], 1, 3))
        rows.append(cells)
    return columns, rows


def flips_plot(path: str | os.PathLike[str], measures: Mapping[str, Any], title: str) -> None:
    """Draws the share of clips whose decision each change alters, and what becomes of the accuracy.

    Without labels, what becomes of the probability of the decision before.

    Args:
      path: PNG file.
      measures: from `measure`.
      title: what was tested.
    """
    rows = measures["transforms"]
    labelled = measures["accuracy"] is not None
    # The kinds apart, as the rows have them one after the other.
    place = np.arange(len(rows), dtype=float) + [row["kind"] != KINDS[True][0] for row in rows]
    figure = plots.new_figure(10.4, 1.9 + 0.24 * (len(rows) + 1))
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    colours = [plots.BLUE if row["kind"] == KINDS[True][0] else plots.ORANGE for row in rows]
    shares = np.array([100 * row["share_changed"] for row in rows])
    limits = np.array([[100 * limit for limit in row["share_changed_interval"]] for row in rows])
    left, right = panels
    left.barh(place, shares, color=colours, height=0.66)
    left.hlines(place, limits[:, 0], limits[:, 1], color=plots.INK, linewidth=1)
    left.set_xlim(0, max(10.0, 1.12 * limits.max()))
    left.set_xlabel("clips whose decision changes, % (95 % Wilson)")
    left.set_yticks(place, [row["name"] for row in rows], fontsize=8.5)
    left.set_ylim(place[-1] + 0.7, -0.7)
    key, factor = ("accuracy_change", 100) if labelled else ("probability_change", 1)
    right.axvline(0, color=plots.INK, linewidth=1)
    for position, row, colour in zip(place, rows, colours, strict=True):
        right.plot(
            factor * row[key], position, "D", color=colour, markersize=5, markeredgecolor="white"
        )
        if row[f"{key}_interval"] is not None:
            low, high = row[f"{key}_interval"]
            right.hlines(position, factor * low, factor * high, color=colour, linewidth=2)
    unit = measures["unit"]
    right.set_xlabel(
        f"change of accuracy, points (95 % bootstrap by {unit})"
        if labelled
        else f"change of the former decision's probability (95 % bootstrap by {unit})"
    )
    for axes in panels:
        axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors="#374151", length=3)
    for irrelevant, colour in ((True, plots.BLUE), (False, plots.ORANGE)):
        left.barh([np.nan], [np.nan], color=colour, label=": ".join(KINDS[irrelevant]))
    figure.legend(frameon=False, fontsize=8.5, ncols=1, loc="outside lower left")
    plots.save(figure, path, title, palette=True)


def _check(tested: Robustness) -> None:
    n, classes = len(tested.clip_ids), len(tested.label_names)
    if not n:
        raise UserError("there is no clip to test.")
    for name, scores in [
        ("as they are", tested.before),
        *((outcome.name, outcome.scores) for outcome in tested.outcomes),
    ]:
        if scores.shape != (n, classes):
            raise UserError(
                f"the scores of the clips ({name}) have the shape {list(scores.shape)}, not {[n, classes]}."
            )
    if len(tested.groups) != n or (tested.targets is not None and len(tested.targets) != n):
        raise UserError(f"groups and targets must be given for each of the {n} clips.")
    if tested.equalised.shape[1:] != (n, classes):
        raise UserError(
            f"the scores under equalisers have the shape {list(tested.equalised.shape)}, not [tries, {n}, {classes}]."
        )


def _searched(
    tested: Robustness, decided: np.ndarray, targets: np.ndarray | None, share: Any
) -> dict[str, Any]:
    """Returns what the best and the worst of the random equalisers do for each clip."""
    decisions = np.concatenate([decided[None], tested.equalised.argmax(axis=2)])
    found: dict[str, Any] = {
        "tries": len(tested.equalised),
        "equaliser": tested.equaliser,
        "changed": share((decisions != decided).any(axis=0).sum()),
        "lowest": None,
        "highest": None,
    }
    if targets is not None:
        right = decisions == targets
        found |= {
            "lowest": share(right.all(axis=0).sum()),
            "highest": share(right.any(axis=0).sum()),
        }
    return found


def _clip_results(tested: Robustness) -> list[dict[str, Any]]:
    """Returns for each clip its decision and the changes that alter it, with what the decision then is."""
    names = tested.label_names
    decided = tested.before.argmax(axis=1)
    after = [outcome.scores.argmax(axis=1) for outcome in tested.outcomes]
    return [
        {
            "clip_id": clip_id,
            "group": tested.groups[i],
            "truth": None if tested.targets is None else names[int(tested.targets[i])],
            "decision": names[decided[i]],
            "probability": round(float(tested.before[i, decided[i]]), 6),
            "changed_by": {
                outcome.name: names[decision[i]]
                for outcome, decision in zip(tested.outcomes, after, strict=True)
                if decision[i] != decided[i]
            },
        }
        for i, clip_id in enumerate(tested.clip_ids)
    ]


def _markdown(
    tested: Robustness,
    measures: Mapping[str, Any],
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    lines = [f"# {title}", ""]
    if tested.synthetic:
        lines += [
            "SYNTHETIC: made-up sound. The numbers show that the code works and say nothing about music.",
            "",
        ]
    lines += [f"- {name}: {value}" for name, value in tested.facts.items()]
    lines += ["", *(f"- {line}" for line in headline(measures)), ""]
    if tested.notes:
        lines += [*(f"- {note}" for note in tested.notes), ""]
    lines += ["![share of clips whose decision changes](robustness.png)", "", *_how(measures), ""]
    lines += [f"| {' | '.join(columns)} |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    lines += ["", "How each change is made:", ""]
    lines += [f"- {outcome.name}: {outcome.what}" for outcome in tested.outcomes]
    if tested.missing:
        lines += [
            "",
            "Not made:",
            "",
            *(f"- {row['name']}: {row['reason']}" for row in tested.missing),
        ]
    if tested.skipped:
        lines += ["", f"Clips that could not be used: {len(tested.skipped)}", ""]
        lines += [f"- {row['clip_id']}: {row['reason']}" for row in tested.skipped]
    if tested.command:
        lines += ["", "How this was made:", "", "```sh", tested.command, "```"]
    if tested.versions:
        lines += ["", ", ".join(f"{name} {version}" for name, version in tested.versions.items())]
    return "\n".join(lines) + "\n"


def _how(measures: Mapping[str, Any]) -> list[str]:
    """Returns how the table is to be read."""
    lines = [f"{name.capitalize()}: {what}." for name, what in KINDS.values()]
    return [
        " ".join(lines)
        + " Worse: clips right before and wrong after; better: the other way round. "
        f"Intervals are of {100 * measures['level']:.0f} %, each for itself: of "
        f"{len(measures['transforms'])} rows about one in twenty has a p below 0.05 where nothing is behind it."
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{_percent(found['share'])} % ({_percent(low)}-{_percent(high)})"


def _signed(value: float, interval: Sequence[float] | None, factor: float, digits: int) -> str:
    # A rounded zero has no sign.
    number = f"{round(value, digits) + 0.0:+.{digits}f}"
    if interval is None:
        return number
    low, high = (round(factor * limit, digits) + 0.0 for limit in interval)
    return f"{number} ({low:+.{digits}f} to {high:+.{digits}f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
