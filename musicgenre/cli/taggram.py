"""Labels over time: as arrays, as a table, and as a picture below the spectrogram.

musicgenre taggram mix.mp3 --out=pictures
musicgenre taggram mix.mp3 --step=5 --formats=png

For each file, `<out>/<name>.taggram.npz` (`label` [labels], `start`, `end` in seconds [windows], `probability` [windows,
labels]), `.csv` and `.png`.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from musicgenre.cli.files import Tally, add_files, add_model, expand, load_tagger

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger
    from musicgenre.inference.windows import FileScores, WindowScores

_FORMATS = ("npz", "csv", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_files(parser)
    add_model(parser)
    parser.add_argument(
        "--out", default=".", help="folder that is written to (default: the current one)"
    )
    parser.add_argument("--formats", default=",".join(_FORMATS), help="any of %(default)s")
    parser.add_argument(
        "--step",
        type=float,
        default=0.0,
        help="seconds from one window to the next; 0 sets window after window",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=15,
        help="labels in the picture, those with the highest peaks (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the taggram of every file; returns 3 where some failed, 2 where all did."""
    from musicgenre.errors import UserError, did_you_mean

    formats = arguments.formats.split(",")
    for name in formats:
        if name not in _FORMATS:
            raise UserError(f"--formats: {name!r} is not known." + did_you_mean(name, _FORMATS))
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, not {arguments.top}.")
    tally = Tally()
    files = expand(arguments.files, tally)
    if not files:
        return tally.exit_code()
    tagger = load_tagger(arguments)
    step = tagger.step_frames(arguments.step)
    folder = Path(arguments.out)
    taken: set[str] = set()
    for scores in tagger.scores(files, step=step, keep_windows=True):
        if scores.windows is None:
            tally.fail(scores.error)
            continue
        # Files of the same name in different folders keep apart.
        stem = Path(scores.path).stem
        number = 1
        while (unique := stem if number == 1 else f"{stem}-{number}") in taken:
            number += 1
        taken.add(unique)
        written = [
            str(
                _write(
                    folder / f"{unique}.taggram.{name}", tagger, scores, scores.windows, arguments
                )
            )
            for name in formats
        ]
        print(
            f"{scores.path}: {len(scores.windows.starts)} windows -> {', '.join(written)}",
            flush=True,
        )
        tally.done += 1
    return tally.exit_code()


def _write(
    path: Path,
    tagger: "Tagger",
    scores: "FileScores",
    windows: "WindowScores",
    arguments: argparse.Namespace,
) -> Path:
    """Writes one file in the format that its ending names."""
    import csv

    import numpy as np

    from musicgenre.files import replacing

    if path.suffix == ".npz":
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                label=np.array(tagger.labels),
                start=windows.starts,
                end=windows.ends,
                probability=windows.probabilities,
            )
    elif path.suffix == ".csv":
        with (
            replacing(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["start", "end", *tagger.labels])
            for start, end, row in zip(
                windows.starts, windows.ends, windows.probabilities, strict=True
            ):
                writer.writerow([f"{start:.3f}", f"{end:.3f}", *(f"{value:.6f}" for value in row)])
    else:
        draw_taggram(path, tagger, scores.path, windows, top=arguments.top)
    return path


def draw_taggram(
    path: Path, tagger: "Tagger", sound: str, windows: "WindowScores", *, top: int = 15
) -> None:
    """Draws a file's spectrogram and its labels over time.

    Args:
      path: PNG file.
      tagger: gives labels, task and front end.
      sound: the sound file, which is read once more.
      windows: its scores.
      top: labels that are shown.

    Raises:
      UserError: the sound file cannot be used.
    """
    from musicgenre.audio.features import to_db
    from musicgenre.evaluation import plots
    from musicgenre.inference.spectrogram import mel_ticks, overview, overview_spec

    spec = overview_spec(tagger.model.features)
    power, seconds = overview(sound, spec, min_seconds=tagger.min_seconds)
    panel = plots.TimePanel(
        to_db(power, spec),
        seconds,
        -spec.hop_length / spec.sample_rate / 2,
        "mel spectrogram",
        "frequency (Hz)",
        mel_ticks(spec),
        "dB",
        (-80.0, 0.0),
    )
    name = Path(sound).name.encode("utf-8", "replace").decode()
    synthetic = "SYNTHETIC · " if tagger.model.dataset.get("synthetic") else ""
    title = (
        f"{synthetic}{name} · {tagger.model.config.model.name} on {tagger.model.dataset['name']}"
    )
    plots.taggram(
        path,
        panel,
        windows.starts,
        windows.ends,
        windows.probabilities,
        tagger.labels,
        title,
        most=top,
        unit="value" if tagger.model.task == "regression" else "probability",
    )
