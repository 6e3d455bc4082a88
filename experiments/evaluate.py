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

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import LEAKAGE

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "workdir", None, "A run's folder, a bundle, or a packaged model's name.", FLAGS, required=True
)
flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Split to evaluate.", FLAGS)
flags.DEFINE_string("store", "", "Store to evaluate on; that of the training if empty.", FLAGS)
flags.DEFINE_string("arrays", "", "Or a file of spectrograms (.npz or .npy), as --split.", FLAGS)
flags.DEFINE_string(
    "checkpoint", "last", "last, best (by the validation measure) or a step.", FLAGS
)
flags.DEFINE_string("out", "", "Folder; <workdir>/evaluation-<split> if empty.", FLAGS)
flags.DEFINE_string(
    "temperature",
    "",
    "Also measures calibration after temperature scaling (single-label models only): the "
    "temperature, or what it is fitted on, a split or a file of spectrograms.",
    FLAGS,
)
flags.DEFINE_bool(
    "fatal_leakage",
    False,
    f"Exit with {LEAKAGE} if the audit finds training clips in the split, or if they are unknown.",
    FLAGS,
)
flags.DEFINE_multi_integer(
    "neighbours",
    [],
    "Also measures the fraction of each clip's K nearest others, by embedding, that are of its "
    "class.",
    flag_values=FLAGS,
)


def main() -> int:
    """Evaluates every run, prints a line for each and the report's path."""
    from musicgenre.studies.evaluate import evaluate_runs

    names = "split store arrays checkpoint out temperature neighbours"
    options = {name: FLAGS[name].value for name in names.split()}
    result = evaluate_runs(FLAGS.workdir, **options, command=app.command_line())
    print("\n".join(result.lines))
    if result.leaks and FLAGS.fatal_leakage:
        text = "the evaluated clips are not, or not known to be, independent of the training clips"
        print(f"error: {text} (--fatal_leakage).", file=sys.stderr)
        return LEAKAGE
    return 0


if __name__ == "__main__":
    app.run(__name__)
