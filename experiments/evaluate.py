r"""Measures trained models on a split and writes a report; several --workdir are seeds of one experiment.

Of several, <out>/ensemble is the report of the mean of their scores, beside the summary over them and each one's own report.

A bundle, or the name of a packaged model, needs --store or --arrays, and --out. What it was trained on is not known, so its audit
cannot say that there is no leak.

python experiments/evaluate.py --workdir=runs/conv1d --split=valid
python experiments/evaluate.py --workdir=runs/a/seed0 --workdir=runs/a/seed1 --arrays=test.npz --split=test --out=runs/a/test
python experiments/evaluate.py --workdir=runs/conv1d --split=test --temperature=valid
"""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError
from musicgenre.evaluation.ensemble import ensemble
from musicgenre.evaluation.report import (
    Evaluation,
    calibration_line,
    headline,
    measure,
    summarise_seeds,
    write_report,
)
from musicgenre.files import write_json
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import (
    evaluate_model,
    store_of_arrays,
    temperature_source,
    training_store,
)
from musicgenre.studies.retrieval import neighbour_report, neighbour_table

_WORKDIRS = flags.DEFINE_multi_string(
    "workdir",
    None,
    "Folder of a trained run, a bundle, or the name of a packaged model; may be given several times.",
    required=True,
)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Split to evaluate.")
_STORE = flags.DEFINE_string(
    "store", "", "Store to evaluate on; the one that the model was trained on if empty."
)
_ARRAYS = flags.DEFINE_string(
    "arrays",
    "",
    "File of spectrograms (.npz or .npy) to evaluate on instead, all of it as --split.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "last, best (by the validation measure) or a step."
)
_OUT = flags.DEFINE_string(
    "out", "", "Folder of the report; <workdir>/evaluation-<split> if empty."
)
_TEMPERATURE = flags.DEFINE_string(
    "temperature",
    "",
    "Also: what the probabilities are worth after temperature scaling (classes only): the temperature itself, or where it is "
    "fitted, a split (train, valid, test) or a file of spectrograms (.npz or .npy).",
)
_FATAL = flags.DEFINE_bool(
    "fatal_leakage",
    False,
    "Exit with 4 when the audit finds leaks from the training clips, or these are not known.",
)
_NEIGHBOURS = flags.DEFINE_multi_integer(
    "neighbours",
    [],
    "Also: the share of each clip's K nearest others, by embedding, that is of its class; several.",
)

LEAKAGE = 4


def main() -> int:
    """Evaluates every run, prints a line for each and where the report is."""
    workdirs = [Path(workdir) for workdir in _WORKDIRS.value]
    if len(workdirs) > 1 and not _OUT.value:
        raise UserError("several --workdir need a place for their common report: --out=...")
    command = shlex.join(["python", *sys.argv])
    runs, evaluations, calibrations = [], [], []
    leaks = False
    with tempfile.TemporaryDirectory() as scratch:
        for number, workdir in enumerate(workdirs):
            model = load_model(workdir, _CHECKPOINT.value)
            if model.workdir.is_file() and not _OUT.value:
                raise UserError(f"{workdir}: the report on a bundle needs a place: --out=...")
            if _ARRAYS.value:
                store = store_of_arrays(
                    model, _ARRAYS.value, _SPLIT.value, Path(scratch) / str(number)
                )
            else:
                store = Store.open(_STORE.value or training_store(model.workdir))
            evaluation = evaluate_model(model, store, _SPLIT.value, command=command)
            out = Path(_OUT.value) if _OUT.value else workdir / f"evaluation-{_SPLIT.value}"
            calibration = None
            if _TEMPERATURE.value:
                place = Path(scratch) / f"temperature{number}"
                calibration = temperature_source(
                    _TEMPERATURE.value, evaluation, model, store, place, alone=bool(_ARRAYS.value)
                )
                if calibration is None:
                    print(
                        f"--temperature is left out: it is for classes, and the task is {evaluation.task}."
                    )
            metrics = measure(evaluation, calibration=calibration)
            report = write_report(
                out / f"run{number}" if len(workdirs) > 1 else out, evaluation, metrics=metrics
            )
            runs.append((str(workdir), metrics))
            evaluations.append(evaluation)
            calibrations.append(calibration)
            if _NEIGHBOURS.value:
                found = neighbour_report(model, store, _SPLIT.value, ks=_NEIGHBOURS.value)
                write_json(report.parent / "neighbours.json", found)
                print(neighbour_table(found))
            _say(str(workdir), evaluation, metrics)
            if evaluation.audit is not None:
                print("\n".join(evaluation.audit.summary()))
                leaks |= not evaluation.audit.clean
    first = evaluations[0]
    if len(workdirs) > 1:
        names = [name for name, _ in runs]
        together = ensemble(evaluations, names)
        fitted_on = [
            calibration for calibration in calibrations if isinstance(calibration, Evaluation)
        ]
        calibration = ensemble(fitted_on, names) if fitted_on else calibrations[0]
        metrics = measure(together, calibration=calibration)
        of_ensemble = write_report(Path(_OUT.value) / "ensemble", together, metrics=metrics)
        _say(f"ensemble of {len(runs)} (mean of their scores)", together, metrics)
        correct = None
        if first.task == "single_label":
            correct = np.stack(
                [
                    evaluation.scores.argmax(axis=1) == evaluation.targets
                    for evaluation in evaluations
                ]
            )
        report = summarise_seeds(
            Path(_OUT.value),
            runs,
            title=f"{len(runs)} runs on {first.dataset}, {first.protocol}, {first.split}",
            correct=correct,
            groups=first.groups,
            group_name=first.group_name,
            ensemble=metrics,
            synthetic=first.synthetic,
            command=command,
        )
        print((Path(_OUT.value) / "summary.json").read_text(encoding="utf-8"))
        print(f"report of the ensemble: {of_ensemble}")
    print(f"report: {report}")
    if leaks and _FATAL.value:
        print(
            "error: the evaluated clips are not, or not known to be, independent of the training clips (--fatal_leakage).",
            file=sys.stderr,
        )
        return LEAKAGE
    return 0


def _say(name: str, evaluation: Evaluation, metrics: dict[str, Any]) -> None:
    print(
        f"{'SYNTHETIC audio, ' if evaluation.synthetic else ''}{name}, {evaluation.split}: {headline(metrics)}"
    )
    if line := calibration_line(metrics):
        print(line)


if __name__ == "__main__":
    app.run(main)
