"""Show labels over time: as arrays, as a table, and as a picture below the spectrogram.

musicgenre taggram mix.mp3 --out=pictures
musicgenre taggram mix.mp3 --step=5 --formats=png

For each file, `<out>/<name>.taggram.npz` (`label` [labels], `start`, `end` in seconds [windows],
`probability` [windows, labels]), `.csv` and `.png`.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from musicgenre.cli.files import FILES, Tally, define_model, expand, load_tagger, write_npz
from musicgenre.errors import UserError, did_you_mean
from musicgenre.files import write_text

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger
    from musicgenre.inference.windows import FileScores, WindowScores

_FORMATS = ("npz", "csv", "png")
FLAGS = flags.FlagValues()
ARGUMENTS = FILES
define_model(FLAGS)
flags.DEFINE_string("out", ".", "Folder to write to.", FLAGS)
flags.DEFINE_list("formats", list(_FORMATS), "Any of these.", FLAGS)
flags.DEFINE_float("step", 0.0, "Seconds between windows; 0 is no overlap.", flag_values=FLAGS)
flags.DEFINE_integer("top", 15, "Labels in the picture, by their peaks.", 1, flag_values=FLAGS)


def main(words: list[str]) -> int:
    """Writes the taggram of every file; returns 3 if some failed, 2 if all did."""
    for name in FLAGS.formats:
        if name not in _FORMATS:
            raise UserError(f"--formats: {name!r} is not known." + did_you_mean(name, _FORMATS))
    tally = Tally()
    files = expand(words, tally)
    if not files:
        return tally.exit_code()
    tagger = load_tagger(FLAGS)
    step = tagger.step_frames(FLAGS.step)
    taken: set[str] = set()
    for scores in tagger.scores(files, step=step, keep_windows=True):
        if scores.windows is None:
            tally.fail(scores.error)
            continue
        # Files of the same name in different folders get different numbers.
        stem = Path(scores.path).stem
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        unique = next(name for name in names if name not in taken)
        taken.add(unique)
        written = [Path(FLAGS.out) / f"{unique}.taggram.{name}" for name in FLAGS.formats]
        for path in written:
            _write(path, tagger, scores, scores.windows)
        count = len(scores.windows.starts)
        counted = f"{count} window{'s' if count > 1 else ''}"
        print(f"{scores.path}: {counted} -> {', '.join(map(str, written))}", flush=True)
        tally.done += 1
    return tally.exit_code()


def _write(path: Path, tagger: "Tagger", scores: "FileScores", windows: "WindowScores") -> None:
    """Writes one file in the format of its ending."""
    import numpy as np

    starts, ends, values = windows.starts, windows.ends, windows.probabilities
    if path.suffix == ".npz":
        labels = np.array(tagger.labels)
        write_npz(path, {"label": labels, "start": starts, "end": ends, "probability": values})
    elif path.suffix == ".csv":
        from musicgenre.evaluation.render import csv_text

        rows = [
            [f"{start:.3f}", f"{end:.3f}", *(f"{value:.6f}" for value in row)]
            for start, end, row in zip(starts, ends, values, strict=True)
        ]
        write_text(path, csv_text(["start", "end", *tagger.labels], rows))
    else:
        _draw(path, tagger, scores.path, windows)


def _draw(path: Path, tagger: "Tagger", sound: str, windows: "WindowScores") -> None:
    """Draws a file's spectrogram, for which it is read again, and its labels over time."""
    from musicgenre.audio.features import to_db
    from musicgenre.evaluation import plots
    from musicgenre.inference.spectrogram import feature_panel, overview, overview_spec

    model = tagger.model
    spec = overview_spec(model.features)
    power, step = overview(sound, spec, min_seconds=tagger.min_seconds)
    panel = dataclasses.replace(feature_panel(to_db(power, spec), spec), seconds=step)
    values, unit = windows.probabilities, "value" if model.task == "regression" else "probability"
    arguments = (panel, windows.starts, windows.ends, values, tagger.labels)
    figure = plots.taggram(*arguments, most=FLAGS.top, unit=unit)
    name = Path(sound).name.encode("utf-8", "replace").decode()
    synthetic = "SYNTHETIC · " if model.dataset.get("synthetic") else ""
    title = f"{synthetic}{name} · {model.config.model.name} on {model.dataset['name']}"
    plots.save(figure, path, title, palette=True)
