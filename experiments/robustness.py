r"""Change clips in ways that keep their genre, and report how often a model's answer changes.

Sound: level, polarity, equalisers, start of the clip, mp3, tempo, pitch, band limits, noise.
Arrays of log-mels: the changes that can be made on them. After Sturm's test of "horses" (2014), see
musicgenre/evaluation/robustness.py.

musicgenre robustness --workdir=gtzan --audio=<folder with one sub-folder per genre> --out=report
musicgenre robustness --workdir=runs/conv1d --arrays=valid.npz --out=runs/robustness/valid
"""

import sys

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import PARTIAL, UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "workdir", None, "A run's folder, a bundle, or a packaged model's name.", FLAGS, required=True
)
flags.DEFINE_string(
    "checkpoint", "last", "last, best (by the validation measure) or a step.", FLAGS
)
flags.DEFINE_multi_string(
    "audio",
    [],
    "Folder with one sub-folder per label, or a file, whose folder is its label.",
    FLAGS,
)
flags.DEFINE_string("arrays", "", "File of spectrograms (.npz or .npy) instead.", FLAGS)
flags.DEFINE_enum(
    "split",
    "",
    ["", "train", "valid", "test"],
    "With --audio: the split, if the folder has one folder per split; all if empty.",
    FLAGS,
)
flags.DEFINE_bool("labels", True, "With --audio: folders are named after labels.", FLAGS)
flags.DEFINE_string("out", None, "Folder of the report.", FLAGS, required=True)
flags.DEFINE_integer("tries", 20, "Random equalisers per clip; 0 is none.", 0, flag_values=FLAGS)
flags.DEFINE_float(
    "seconds", 60.0, "Longest excerpt, from the middle; 0: no limit.", 0.0, flag_values=FLAGS
)
flags.DEFINE_float("min_seconds", 1.0, "Shorter sound files are skipped.", 1.0, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of equalisers, noise and bootstrap.", 0, flag_values=FLAGS)
flags.DEFINE_bool("progress", True, "Draw progress bars.", FLAGS)


def main() -> int:
    """Tests the model and prints the main results; returns 3 if clips were skipped."""
    if bool(FLAGS.audio) == bool(FLAGS.arrays):
        raise UserError("name either sound (--audio=...) or a file of spectrograms (--arrays=...).")

    from musicgenre.evaluation.robustness import headline, measure, write_report
    from musicgenre.runs.model import load_model
    from musicgenre.studies.robustness import find_sounds, probe_arrays, probe_sounds

    common = {name: FLAGS[name].value for name in ("tries", "seed", "progress")}
    common["command"] = app.command_line()
    clips = find_sounds(FLAGS.audio, split=FLAGS.split, labelled=FLAGS.labels)
    model = load_model(FLAGS.workdir, FLAGS.checkpoint)
    if FLAGS.arrays:
        tested = probe_arrays(model, FLAGS.arrays, **common)
    else:
        lengths = {name: FLAGS[name].value for name in ("seconds", "min_seconds")}
        tested = probe_sounds(model, clips, **lengths, **common)
    measures = measure(tested, seed=FLAGS.seed)
    report = write_report(FLAGS.out, tested, measures)
    if tested.synthetic:
        print("SYNTHETIC: the model was trained on synthetic audio; this says nothing about music.")
    print("\n".join(headline(measures)))
    for row in tested.missing:
        print(f"not made: {row['name']}: {row['reason']}")
    for row in tested.skipped:
        print(f"error: {row['reason']}", file=sys.stderr)
    print(f"report: {report}")
    return PARTIAL if tested.skipped else 0


if __name__ == "__main__":
    app.run(__name__)
