"""Label sound files, with probabilities.

musicgenre tag song.mp3 album/ 'mixes/*.flac' --top=3
find music -name '*.mp3' -print0 | musicgenre tag - --format=jsonl > labels.jsonl
musicgenre tag music/ --format=m3u --out=playlists    # one playlist per label
musicgenre tag album/ --write_tags --dry_run          # what the files' genre tags would become
musicgenre tag album/ --write_tags
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from musicgenre.cli.files import FILES, Tally, define_model, expand, load_tagger, write_lines
from musicgenre.errors import UserError

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tag, Tagger
    from musicgenre.inference.windows import FileScores

FLAGS = flags.FlagValues()
ARGUMENTS = FILES
define_model(FLAGS)
flags.DEFINE_alias("workdir", "model", FLAGS)
flags.DEFINE_integer(
    "top",
    None,
    "Labels per file (default: 3; with m3u and --write_tags 1 if labels exclude each other).",
    1,
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "min_probability", 0.0, "For m3u and tags: drop labels below this.", flag_values=FLAGS
)
flags.DEFINE_enum(
    "format", "table", ["table", "jsonl", "json", "csv", "m3u"], "csv has every label.", FLAGS
)
flags.DEFINE_string(
    "out", "", "File to write, or for m3u a folder; standard output if empty.", FLAGS
)
flags.DEFINE_bool("write_tags", False, "Write the labels into the files' genre tags.", FLAGS)
flags.DEFINE_bool("dry_run", False, "With --write_tags: print, write nothing.", FLAGS)
flags.DEFINE_bool("keep_genre", False, "With --write_tags: skip files with a genre.", FLAGS)


def main(words: list[str]) -> int:
    """Tags every file; returns 3 if some failed, 2 if all did."""
    if (FLAGS.dry_run or FLAGS.keep_genre) and not FLAGS.write_tags:
        raise UserError("--dry_run and --keep_genre go with --write_tags.")
    playlists = FLAGS.format == "m3u"
    if playlists and not FLAGS.out:
        raise UserError("--format=m3u needs --out, the folder of the playlists.")
    tally = Tally()
    files = expand(words, tally)
    if not files:
        return tally.exit_code()
    tagger = load_tagger(FLAGS)
    model = tagger.model
    chosen = playlists or FLAGS.write_tags
    if chosen and model.task == "regression":
        reason = "its outputs are numbers, but m3u and --write_tags need labels"
        raise UserError(f"{FLAGS.model}: {reason}.")
    top = FLAGS.top or (1 if chosen and model.task == "single_label" else 3)
    predictions = _predictions(tagger, files, top, tally)
    if playlists:
        lists: dict[str, list[tuple[float, str]]] = {}
        for prediction in predictions:
            for name, probability in _labels(tagger, prediction, top):
                lists.setdefault(name, []).append((probability, prediction.path))
        _write_playlists(Path(FLAGS.out), lists)
    else:
        from musicgenre.inference.predict import render

        lines = render(predictions, model.label_names, FLAGS.format, top, model.task)
        write_lines(lines, FLAGS.out)
    return tally.exit_code()


def _predictions(
    tagger: "Tagger", files: list[str], top: int, tally: Tally
) -> Iterator["FileScores"]:
    """Yields the prediction of each file, counted in `tally`, after writing its tags."""
    for prediction in tagger.scores(files):
        error = prediction.error
        if not error and FLAGS.write_tags:
            names = [name for name, _ in _labels(tagger, prediction, top)]
            error = _write_genre(prediction.path, names)
        if error:
            tally.fail(error)
        else:
            tally.done += 1
        yield prediction


def _labels(tagger: "Tagger", prediction: "FileScores", top: int) -> "list[Tag]":
    """Returns the most probable labels of a file, none if it failed."""
    tags = tagger.tags(prediction, top)
    return [tag for tag in tags if tag.probability >= FLAGS.min_probability]


def _write_genre(path: str, names: list[str]) -> str:
    """Writes the genre tag of one file, or prints the change; returns an error message or ""."""
    from musicgenre.audio.file_tags import read_genre, write_genre

    try:
        before = read_genre(path)
        if not names or (FLAGS.keep_genre and before) or before == names:
            return ""
        if not FLAGS.dry_run:
            write_genre(path, names)
    except UserError as error:
        return str(error)
    changed = f"{'would be ' if FLAGS.dry_run else ''}changed"
    change = f"{', '.join(before) or '(none)'} -> {', '.join(names)}"
    print(f"{path}: genre {changed}: {change}", file=sys.stderr, flush=True)
    return ""


def _write_playlists(folder: Path, lists: dict[str, list[tuple[float, str]]]) -> None:
    """Writes `<label>.m3u8` for each label, the most probable file first."""
    taken: set[str] = set()
    for name in sorted(lists):
        plain = "".join("_" if c in '/\\:*?"<>|' or ord(c) < 32 else c for c in name)
        stem = plain.strip(". ") or "_"
        while stem.lower() in taken:
            stem += "_"
        taken.add(stem.lower())
        lines = ["#EXTM3U", f"#PLAYLIST:{name}"]
        for probability, path in sorted(lists[name], key=lambda entry: (-entry[0], entry[1])):
            lines.append(f"#EXTINF:-1,{Path(path).stem} ({100 * probability:.0f} %)")
            lines.append(os.path.abspath(path))
        write_lines(lines, str(folder / f"{stem}.m3u8"))
        print(f"{folder / stem}.m3u8: {len(lists[name])} files")
