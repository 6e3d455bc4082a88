r"""Measure trained models on a split and write a report with confidence intervals.

Several --workdir are seeds of one experiment: <out>/ensemble is the report of the mean of their
scores, next to the summary over them and the report of each. A bundle or a packaged model needs
--store or --arrays, and --out.

musicgenre evaluate --workdir=runs/conv1d --split=valid
musicgenre evaluate --workdir=runs/a/seed0 --workdir=runs/a/seed1 \
    --arrays=test.npz --out=runs/a/test
musicgenre evaluate --workdir=runs/conv1d --split=test --temperature=valid
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import LEAKAGE, UserError

if TYPE_CHECKING:
    from musicgenre.evaluation.report import Evaluation

FLAGS = flags.FlagValues()
_WORKDIRS = flags.DEFINE_multi_string(
    "workdir", None, "A run's folder, a bundle, or a packaged model's name.", FLAGS, required=True
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Split to evaluate.", FLAGS)
_STORE = flags.DEFINE_string(
    "store", "", "Store to evaluate on; the one that the model was trained on if empty.", FLAGS
)
_ARRAYS = flags.DEFINE_string(
    "arrays", "", "Or a file of spectrograms (.npz or .npy), all of it as --split.", FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "last, best (by the validation measure) or a step.", FLAGS
)
_OUT = flags.DEFINE_string(
    "out", "", "Folder of the report; <workdir>/evaluation-<split> if empty.", FLAGS
)
_TEMPERATURE = flags.DEFINE_string(
    "temperature",
    "",
    "Also measures calibration after temperature scaling (single-label models only): the "
    "temperature, or what it is fitted on, a split or a file of spectrograms.",
    FLAGS,
)
_FATAL = flags.DEFINE_bool(
    "fatal_leakage",
    False,
    f"Exit with {LEAKAGE} if the audit finds training clips in the split, or if they are unknown.",
    FLAGS,
)
_NEIGHBOURS = flags.DEFINE_multi_integer(
    "neighbours",
    [],
    "Also measures the fraction of each clip's K nearest others, by embedding, that are of its "
    "class.",
    flag_values=FLAGS,
)


class _Run(NamedTuple):
    """One evaluated run: its workdir, evaluation, calibration source, metrics and report."""

    name: str
    evaluation: "Evaluation"
    calibration: "Evaluation | float | None"
    metrics: dict[str, Any]
    report: Path


def main() -> int:
    """Evaluates every run, prints a line for each and the report's path."""
    workdirs = _WORKDIRS.value
    if len(workdirs) > 1 and not _OUT.value:
        raise UserError("several --workdir need a folder for their common report: --out=...")
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            _evaluate(workdir, Path(scratch) / str(number), number if len(workdirs) > 1 else None)
            for number, workdir in enumerate(workdirs)
        ]
    report = _summarise(runs) if len(runs) > 1 else runs[0].report
    print(f"report: {report}")
    audits = [run.evaluation.audit for run in runs]
    if _FATAL.value and any(audit is not None and not audit.clean for audit in audits):
        print(
            "error: the evaluated clips are not, or not known to be, independent of the training "
            "clips (--fatal_leakage).",
            file=sys.stderr,
        )
        return LEAKAGE
    return 0


def _evaluate(workdir: str, scratch: Path, number: int | None) -> _Run:
    """Evaluates one run and writes its report; `number` counts several runs."""
    from musicgenre.evaluation.report import measure, write_report
    from musicgenre.runs.model import load_model
    from musicgenre.store.store import Store
    from musicgenre.studies.evaluate import (
        evaluate_model,
        store_of_arrays,
        temperature_source,
        training_store,
    )

    split = _SPLIT.value
    model = load_model(workdir, _CHECKPOINT.value)
    if model.workdir.is_file() and not _OUT.value:
        raise UserError(f"{workdir}: the report on a bundle needs a folder: --out=...")
    if _ARRAYS.value:
        store = store_of_arrays(model, _ARRAYS.value, split, scratch / "clips")
    else:
        store = Store.open(_STORE.value or training_store(model.workdir))
    evaluation = evaluate_model(model, store, split, command=app.command_line())
    calibration = None
    if _TEMPERATURE.value:
        fitted = scratch / "temperature"
        calibration = temperature_source(
            _TEMPERATURE.value, evaluation, model, store, fitted, alone=bool(_ARRAYS.value)
        )
        if calibration is None:
            print(f"--temperature has no effect: the task is {evaluation.task}.")
    metrics = measure(evaluation, calibration=calibration)
    out = Path(_OUT.value or Path(workdir) / f"evaluation-{split}")
    report = write_report(
        out if number is None else out / f"run{number}", evaluation, metrics=metrics
    )
    if _NEIGHBOURS.value:
        _write_neighbours(model, store, report.parent)
    _print(workdir, evaluation, metrics)
    if evaluation.audit is not None:
        print("\n".join(evaluation.audit.summary()))
    return _Run(workdir, evaluation, calibration, metrics, report)


def _write_neighbours(model: Any, store: Any, out: Path) -> None:
    """Writes and prints how often the nearest clips are of the same class."""
    from musicgenre.files import write_json
    from musicgenre.studies.retrieval import neighbour_report, neighbour_table

    found = neighbour_report(model, store, _SPLIT.value, ks=_NEIGHBOURS.value)
    write_json(out / "neighbours.json", found)
    print(neighbour_table(found))


def _summarise(runs: list[_Run]) -> Path:
    """Writes the reports of the ensemble and of all runs; returns the latter."""
    from musicgenre.evaluation.ensemble import ensemble
    from musicgenre.evaluation.report import Evaluation, measure, summarise_seeds, write_report

    out, first = Path(_OUT.value), runs[0].evaluation
    evaluations = [run.evaluation for run in runs]
    together = ensemble(evaluations, [run.name for run in runs])
    sources = [run.calibration for run in runs]
    fitted = [source for source in sources if isinstance(source, Evaluation)]
    calibration = ensemble(fitted, [run.name for run in runs]) if fitted else sources[0]
    metrics = measure(together, calibration=calibration)
    ensemble_report = write_report(out / "ensemble", together, metrics=metrics)
    _print(f"ensemble of {len(runs)} (mean of their scores)", together, metrics)
    correct = None
    if first.task == "single_label":
        import numpy as np

        correct = np.stack([one.scores.argmax(axis=1) == one.targets for one in evaluations])
    report = summarise_seeds(
        out,
        [(run.name, run.metrics) for run in runs],
        title=f"{len(runs)} runs on {first.dataset}, {first.protocol}, {first.split}",
        correct=correct,
        groups=first.groups,
        group_name=first.group_name,
        ensemble=metrics,
        synthetic=first.synthetic,
        command=app.command_line(),
    )
    print((out / "summary.json").read_text(encoding="utf-8"))
    print(f"report of the ensemble: {ensemble_report}")
    return report


def _print(name: str, evaluation: "Evaluation", metrics: dict[str, Any]) -> None:
    from musicgenre.evaluation.report import calibration_line, headline

    synthetic = "SYNTHETIC audio, " if evaluation.synthetic else ""
    print(f"{synthetic}{name}, {evaluation.split}: {headline(metrics)}")
    if line := calibration_line(metrics):
        print(line)


if __name__ == "__main__":
    app.run(__name__)
