r"""Says what sound files are, by a trained model.

python experiments/predict.py --workdir=runs/conv1d song.mp3 album/ --top=3
python experiments/predict.py --workdir=runs/conv1d --format=csv --out=labels.csv album/
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from musicgenre.cli import app
from musicgenre.datasets.base import find_audio
from musicgenre.errors import UserError
from musicgenre.files import replacing
from musicgenre.inference.predict import Prediction, predict_files, render
from musicgenre.runs.model import load_model

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a trained run, a bundle, or the name of a packaged model.",
    required=True,
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best or a step.")
_FORMAT = flags.DEFINE_enum(
    "format", "table", ["table", "json", "jsonl", "csv"], "What is written."
)
_TOP = flags.DEFINE_integer("top", 3, "Labels per file in a table or JSON.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "File to write to; standard output if empty.")
_MIN_SECONDS = flags.DEFINE_float("min_seconds", 1.0, "Shorter files are refused.", lower_bound=0.0)


def main(arguments: list[str]) -> int:
    """Predicts every file that is named or lies below a named folder; returns 3 where some failed, 2 where all did."""
    if not arguments:
        raise UserError(
            "no files: name sound files or folders, such as predict.py --workdir=runs/x song.mp3 album/"
        )
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        found = find_audio(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no sound files in this folder.")
        paths += found
    model = load_model(_WORKDIR.value, _CHECKPOINT.value)
    if model.dataset["synthetic"]:
        print(
            "SYNTHETIC: this model was trained on made-up audio; its labels mean nothing for real music.",
            file=sys.stderr,
        )
    tally: Counter[str] = Counter()

    def counted() -> Iterator[Prediction]:
        for prediction in predict_files(model, paths, min_seconds=_MIN_SECONDS.value):
            tally["failed" if prediction.error else "done"] += 1
            if prediction.error:
                print(f"error: {prediction.error}", file=sys.stderr)
            yield prediction

    lines = render(counted(), model.label_names, _FORMAT.value, _TOP.value, model.task)
    if _OUT.value:
        with (
            replacing(_OUT.value) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            file.writelines(line + "\n" for line in lines)
    else:
        for line in lines:
            print(line, flush=True)
    if not tally["failed"]:
        return 0
    print(f"{tally['done']} files predicted, {tally['failed']} failed", file=sys.stderr)
    return app.PARTIAL if tally["done"] else app.USER_ERROR


if __name__ == "__main__":
    app.run(main, takes_files=True)
