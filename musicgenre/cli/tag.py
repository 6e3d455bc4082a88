"""Say what sound files are: labels with probabilities.

musicgenre tag song.mp3 album/ 'mixes/*.flac' --top=3
find music -name '*.mp3' -print0 | musicgenre tag - --format=jsonl > labels.jsonl
musicgenre tag music/ --format=m3u --out=playlists          # a playlist for each label
musicgenre tag album/ --write_tags --dry_run                # what the files' own genre tags would become
musicgenre tag album/ --write_tags
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from musicgenre.cli.files import Tally, add_files, add_model, expand, load_tagger

if TYPE_CHECKING:
    from musicgenre.inference.predict import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_files(parser)
    add_model(parser)
    parser.add_argument(
        "--top",
        type=int,
        help="labels of a file (default: 3; 1 for m3u and --write_tags where a file has one class)",
    )
    parser.add_argument(
        "--min_probability",
        type=float,
        default=0.0,
        help="m3u and --write_tags: leave out labels below",
    )
    parser.add_argument(
        "--format",
        choices=["table", "jsonl", "json", "csv", "m3u"],
        default="table",
        help="default: %(default)s; csv has every label",
    )
    parser.add_argument(
        "--out", default="", help="file to write to, standard output if empty; for m3u a folder"
    )
    parser.add_argument(
        "--write_tags", action="store_true", help="write the labels into the files' own genre tags"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="with --write_tags: say what would be written, and write nothing",
    )
    parser.add_argument(
        "--keep_genre",
        action="store_true",
        help="with --write_tags: leave files alone that have a genre",
    )


def run(arguments: argparse.Namespace) -> int:
    """Tags every file; returns 3 where some failed, 2 where all did."""
    from musicgenre.errors import UserError
    from musicgenre.files import replacing

    if arguments.top is not None and arguments.top < 1:
        raise UserError(f"--top must be at least 1, not {arguments.top}.")
    if (arguments.dry_run or arguments.keep_genre) and not arguments.write_tags:
        raise UserError("--dry_run and --keep_genre go with --write_tags.")
    if arguments.format == "m3u" and not arguments.out:
        raise UserError("--format=m3u needs --out, the folder of the playlists.")
    tally = Tally()
    files = expand(arguments.files, tally)
    if not files:
        return tally.exit_code()
    tagger = load_tagger(arguments)

    from musicgenre.inference.predict import predict_files, render

    model = tagger.model
    chosen = arguments.format == "m3u" or arguments.write_tags
    if chosen and model.task == "regression":
        raise UserError(
            f"{arguments.model}: its outputs are numbers and no labels; m3u and --write_tags need labels."
        )
    top = arguments.top or (1 if chosen and model.task == "single_label" else 3)

    def labels(prediction: "Prediction") -> list[tuple[str, float]]:
        assert prediction.probabilities is not None
        values = prediction.probabilities
        order = (-values).argsort(kind="stable")[:top].tolist()
        return [
            (model.label_names[i], float(values[i]))
            for i in order
            if values[i] >= arguments.min_probability
        ]

    def reported() -> Iterator["Prediction"]:
        for prediction in predict_files(
            model, files, min_seconds=arguments.min_seconds, network=tagger.network
        ):
            error = prediction.error
            if not error and arguments.write_tags:
                names = [name for name, _ in labels(prediction)]
                error = _write(
                    prediction.path, names, dry_run=arguments.dry_run, keep=arguments.keep_genre
                )
            if error:
                tally.fail(error)
            else:
                tally.done += 1
            yield prediction

    if arguments.format == "m3u":
        lists: dict[str, list[tuple[float, str]]] = {}
        for prediction in reported():
            for name, probability in [] if prediction.error else labels(prediction):
                lists.setdefault(name, []).append((probability, prediction.path))
        _write_playlists(Path(arguments.out), lists)
        return tally.exit_code()
    lines = render(reported(), model.label_names, arguments.format, top, model.task)
    if arguments.out:
        with (
            replacing(arguments.out) as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            file.writelines(line + "\n" for line in lines)
    else:
        for line in lines:
            print(line, flush=True)
    return tally.exit_code()


def _write(path: str, names: list[str], *, dry_run: bool, keep: bool) -> str:
    """Writes the genre tag of one file, or says what it would be; returns why that failed, or ""."""
    from musicgenre.audio.file_tags import read_genre, write_genre
    from musicgenre.errors import UserError

    try:
        before = read_genre(path)
        if not names or (keep and before) or before == names:
            return ""
        if not dry_run:
            write_genre(path, names)
    except UserError as error:
        return str(error)
    change = f"{', '.join(before) or '(none)'} -> {', '.join(names)}"
    print(
        f"{path}: genre {'would be ' if dry_run else ''}changed: {change}",
        file=sys.stderr,
        flush=True,
    )
    return ""


def _write_playlists(folder: Path, lists: dict[str, list[tuple[float, str]]]) -> None:
    """Writes `<label>.m3u8` for each label, the most probable file first."""
    from musicgenre.files import replacing

    taken: set[str] = set()
    for name in sorted(lists):
        stem = (
            "".join(
                "_" if letter in '/\\:*?"<>|' or ord(letter) < 32 else letter for letter in name
            ).strip(". ")
            or "_"
        )
        while stem.lower() in taken:
            stem += "_"
        taken.add(stem.lower())
        lines = ["#EXTM3U", f"#PLAYLIST:{name}"]
        for probability, path in sorted(lists[name], key=lambda entry: (-entry[0], entry[1])):
            lines += [
                f"#EXTINF:-1,{Path(path).stem} ({100 * probability:.0f} %)",
                os.path.abspath(path),
            ]
        with (
            replacing(folder / f"{stem}.m3u8") as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write("\n".join(lines) + "\n")
        print(f"{folder / stem}.m3u8: {len(lists[name])} files")
