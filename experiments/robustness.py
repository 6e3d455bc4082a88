r"""Changes clips in ways that leave their genre as it is, and reports how often a model then answers otherwise.

On sound: level, polarity, equalisers, where the clip begins, mp3, tempo, pitch, limits of the band, noise. On arrays of log-mels
what of this can be made there. After Sturm's test of "horses" (2014): see musicgenre/evaluation/robustness.py.

python experiments/robustness.py --workdir=gtzan --audio=<folder with a sub-folder for each genre> --out=runs/robustness/sound
python experiments/robustness.py --workdir=runs/conv1d --arrays=valid.npz --out=runs/robustness/valid
"""

import shlex
import sys

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError
from musicgenre.evaluation.robustness import headline, measure, write_report
from musicgenre.runs.model import load_model
from musicgenre.studies.robustness import find_sounds, probe_arrays, probe_sounds

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a trained run, a bundle, or the name of a packaged model.",
    required=True,
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "last, best (by the validation measure) or a step."
)
_AUDIO = flags.DEFINE_multi_string(
    "audio",
    [],
    "Folder with a sub-folder for each label, or a file, whose folder is its label; may be given several times.",
)
_ARRAYS = flags.DEFINE_string("arrays", "", "File of spectrograms (.npz or .npy) instead.")
_SPLIT = flags.DEFINE_enum(
    "split",
    "",
    ["", "train", "valid", "test"],
    "With --audio: which split, where the folder has one for each; all if empty.",
)
_LABELS = flags.DEFINE_bool(
    "labels", True, "With --audio: folders are named after labels that the model knows."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the report.", required=True)
_TRIES = flags.DEFINE_integer(
    "tries", 20, "Random equalisers to try on each clip; 0 leaves them out.", lower_bound=0
)
_SECONDS = flags.DEFINE_float(
    "seconds", 60.0, "Of a longer sound file its middle; 0 takes all of it.", lower_bound=0.0
)
_MIN_SECONDS = flags.DEFINE_float(
    "min_seconds", 1.0, "Shorter sound files are skipped.", lower_bound=1.0
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the random equalisers, the noise and the bootstrap.", lower_bound=0
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw progress bars.")


def main() -> int:
    """Tests the model, prints what matters most and where the report is; returns 3 where clips were skipped."""
    if bool(_AUDIO.value) == bool(_ARRAYS.value):
        raise UserError("name either sound (--audio=...) or a file of spectrograms (--arrays=...).")
    common = {
        "tries": _TRIES.value,
        "seed": _SEED.value,
        "progress": _PROGRESS.value,
        "command": shlex.join(["python", *sys.argv]),
    }
    if _ARRAYS.value:
        tested = probe_arrays(
            load_model(_WORKDIR.value, _CHECKPOINT.value), _ARRAYS.value, **common
        )
    else:
        clips = find_sounds(_AUDIO.value, split=_SPLIT.value, labelled=_LABELS.value)
        model = load_model(_WORKDIR.value, _CHECKPOINT.value)
        tested = probe_sounds(
            model, clips, seconds=_SECONDS.value, min_seconds=_MIN_SECONDS.value, **common
        )
    measures = measure(tested, seed=_SEED.value)
    report = write_report(_OUT.value, tested, measures=measures)
    if tested.synthetic:
        print("SYNTHETIC: the model was trained on made-up audio; this says nothing about music.")
    print("\n".join(headline(measures)))
    for row in tested.missing:
        print(f"not made: {row['name']}: {row['reason']}")
    for row in tested.skipped:
        print(f"error: {row['reason']}", file=sys.stderr)
    print(f"report: {report}")
    return app.PARTIAL if tested.skipped else 0


if __name__ == "__main__":
    app.run(main)
