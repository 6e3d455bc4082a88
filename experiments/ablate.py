r"""Trains the variants that a config's sweep() names, with several seeds, and writes one table. Run again to go on.

python experiments/ablate.py --config=configs/ablations/report_knobs.py --workdir=runs/report_knobs --seeds=3

By cross-validation inside the train list of a data set of arrays, artists kept together, so that the validation clips have no
say:

python experiments/ablate.py --config=configs/ablations/gtzan_modulation.py --workdir=runs/gtzan_best_folds --folds=5 --seeds=1 \
    --config.data.protocol=artist_kfold --config.data.files.valid=
"""

import importlib.util

from absl import flags
from ml_collections import config_flags

from musicgenre.cli import app
from musicgenre.errors import UserError
from musicgenre.runs.workdir import Interrupted
from musicgenre.studies.ablation import run_ablation, run_folds

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all runs and of the table.", required=True
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each variant: 0, 1, ...", lower_bound=1)
_FOLDS = flags.DEFINE_integer(
    "folds",
    0,
    "Folds that each variant is trained on with each seed; 0: the split as it is.",
    lower_bound=0,
)
_STEPS = flags.DEFINE_integer(
    "steps",
    0,
    "With --folds: steps of each training, to within half an epoch; 0 goes by the epochs.",
    lower_bound=0,
)
_ONLY = flags.DEFINE_list("only", [], "Names of variants to run; all if empty.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.")


def main() -> int:
    """Runs the ablation and prints the table."""
    config = app.get_config()
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    spec = importlib.util.spec_from_file_location("ablation_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise UserError(
            f"{path}: has no sweep(). It should yield (name, {{field: value}}) pairs; see configs/ablations/."
        )
    variants = list(module.sweep())
    if unknown := set(_ONLY.value) - {name for name, _ in variants}:
        raise UserError(
            f"--only: {path} has no variant {sorted(unknown)[0]!r}, but {', '.join(name for name, _ in variants)}."
        )
    variants = [variant for variant in variants if not _ONLY.value or variant[0] in _ONLY.value]
    if _STEPS.value and not _FOLDS.value:
        raise UserError("--steps goes with --folds; without folds set --config.epochs.")
    workdir, seeds, progress = _WORKDIR.value, range(_SEEDS.value), _PROGRESS.value
    try:
        if _FOLDS.value:
            run_folds(
                config,
                variants,
                workdir,
                seeds,
                _FOLDS.value,
                steps=_STEPS.value,
                progress=progress,
            )
        else:
            run_ablation(config, variants, workdir, seeds, progress=progress)
    except Interrupted as stop:
        print(stop)
        return 128 + stop.signal_number
    with open(f"{_WORKDIR.value}/ablation.md", encoding="utf-8") as table:
        print(table.read())
    return 0


if __name__ == "__main__":
    app.define_config_flag()
    app.run(main)
