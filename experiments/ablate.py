r"""Train the variants in a config's sweep() with several seeds and tabulate them; resumes.

musicgenre ablate --config=ablations/report_knobs --workdir=runs/report_knobs --seeds=3

By cross-validation within the training list of a data set of arrays, artists kept together:

musicgenre ablate --config=ablations/gtzan_modulation --workdir=runs/gtzan_modulation_folds \
    --folds=5 --seeds=1 --config.data.protocol=artist_kfold --config.data.files.valid=
"""

import runpy
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from musicgenre.cli import app
from musicgenre.errors import UserError, did_you_mean

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "Folder of the runs and the table.", FLAGS, required=True)
flags.DEFINE_integer("seeds", 3, "Seeds of each variant: 0, 1, ...", 1, flag_values=FLAGS)
flags.DEFINE_integer(
    "folds", 0, "Folds per variant and seed; 0: the data set's split.", 0, flag_values=FLAGS
)
flags.DEFINE_integer(
    "steps",
    0,
    "With --folds: steps of each training, to within half an epoch; 0 uses config.epochs.",
    0,
    flag_values=FLAGS,
)
flags.DEFINE_list("only", [], "Names of variants to run; all if empty.", FLAGS)
flags.DEFINE_bool("progress", True, "Draw progress bars.", FLAGS)


def main() -> int:
    """Runs the ablation and prints the table."""
    config = app.get_config(FLAGS)
    variants = _variants(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    if FLAGS.steps and not FLAGS.folds:
        raise UserError("--steps goes with --folds; without folds set --config.epochs.")

    from musicgenre.runs.workdir import Interrupted
    from musicgenre.studies.ablation import run_ablation, run_folds

    arguments = (config, variants, FLAGS.workdir, range(FLAGS.seeds))
    try:
        if FLAGS.folds:
            run_folds(*arguments, FLAGS.folds, steps=FLAGS.steps, progress=FLAGS.progress)
        else:
            run_ablation(*arguments, progress=FLAGS.progress)
    except Interrupted as stop:
        print(stop)
        return 128 + stop.signal_number
    print(Path(FLAGS.workdir, "ablation.md").read_text(encoding="utf-8"))
    return 0


def _variants(path: str) -> list[tuple[str, dict[str, object]]]:
    """Returns the variants of a config file that --only names, or all."""
    module = runpy.run_path(path)
    if "sweep" not in module:
        remedy = "It must yield pairs of a name and {field: value}, as the configs in ablations/ do"
        raise UserError(f"{path}: has no sweep(). {remedy}.")
    variants = list(module["sweep"]())
    names = [name for name, _ in variants]
    for name in FLAGS.only:
        if name not in names:
            raise UserError(f"--only={name}: no variant of {path}.{did_you_mean(name, names)}")
    return [variant for variant in variants if variant[0] in (FLAGS.only or names)]


if __name__ == "__main__":
    app.run(__name__)
