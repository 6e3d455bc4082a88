"""Find the files in an index of your music that sound like a given file.

musicgenre similar --index=music.index --add=music/       # make or update the index
musicgenre similar song.mp3 --index=music.index --k=5
musicgenre similar song.mp3 --index=music.index --format=m3u --out=like_song.m3u8
find new -name '*.mp3' | musicgenre similar - --index=music.index --format=jsonl

--add embeds new and changed files, and drops those that are gone from a named folder. Other files
stay in the index. A stopped update keeps what it has done. An index belongs to one model. A query
that is in the index is not among its own results.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from musicgenre.cli.files import FILES, Tally, define_model, expand, load_tagger, write_lines
from musicgenre.errors import UserError

if TYPE_CHECKING:
    from musicgenre.inference.index import EmbeddingIndex, Neighbour
    from musicgenre.inference.tagger import Tagger

FLAGS = flags.FlagValues()
ARGUMENTS = FILES
define_model(FLAGS)
flags.DEFINE_string("index", None, "The file of the index.", FLAGS, required=True)
flags.DEFINE_multi_string(
    "add", [], "Files, a folder, a pattern or - to bring into the index.", FLAGS
)
flags.DEFINE_integer("k", 10, "Neighbours per file.", 1, flag_values=FLAGS)
flags.DEFINE_enum(
    "format",
    "table",
    ["table", "jsonl", "csv", "m3u"],
    "m3u is one playlist of the neighbours of all given files, each once.",
    FLAGS,
)
flags.DEFINE_string("out", "", "File to write; standard output if empty.", FLAGS)


class _Answer(NamedTuple):
    """A query with its neighbours, or with the reason why it has none."""

    path: str
    neighbours: "Sequence[Neighbour]"
    error: str = ""


def main(words: list[str]) -> int:
    """Updates and queries the index; returns 3 if some files failed, 2 if all did."""
    if not words and not FLAGS.add:
        raise UserError("no files: name some, or make the index with --add=<folder>.")
    if "-" in words and "-" in FLAGS.add:
        raise UserError("standard input (-) can list the files or those of --add, not both.")
    path = FLAGS.index
    if FLAGS.out and os.path.abspath(FLAGS.out) == os.path.abspath(path):
        raise UserError(f"--out={FLAGS.out} is the index.")

    from musicgenre.inference.index import EmbeddingIndex

    index = None
    if os.path.lexists(path) or not FLAGS.add:
        index = EmbeddingIndex.load(path)
    tally = Tally()
    added = expand(FLAGS.add, tally) if FLAGS.add else []
    queries = expand(words, tally) if words else []
    if not added and not queries:
        return tally.exit_code()
    tagger = load_tagger(FLAGS)
    index = EmbeddingIndex.of(tagger.model) if index is None else index
    index.check_model(tagger.model)
    if added:
        _update(index, tagger, added, tally)
    elif index.outdated:
        old = f"version 0.1 embedded {index.outdated} of {len(index)} files"
        again = "which differs slightly for long ones; embed them again with --add."
        print(f"{path}: {old}, {again}", file=sys.stderr)
    if queries:
        if not len(index):
            raise UserError(f"{path}: the index is empty; add files with --add=<folder>.")
        write_lines(_render(_ask(index, tagger, queries, tally), tally), FLAGS.out)
    return tally.exit_code()


def _update(index: "EmbeddingIndex", tagger: "Tagger", files: list[str], tally: Tally) -> None:
    folders = [name for name in FLAGS.add if os.path.isdir(name)]
    options = {"failed": tally.fail, "save_to": FLAGS.index, "progress": True}
    done = index.update(tagger, files, folders, **options)
    tally.done += done.added + done.changed + done.unchanged
    parts = [f"{count} {name}" for name, count in zip(done._fields, done, strict=True) if count]
    print(f"{FLAGS.index}: {len(index)} files ({', '.join(parts)})", file=sys.stderr)


def _ask(
    index: "EmbeddingIndex", tagger: "Tagger", queries: list[str], tally: Tally
) -> Iterator[_Answer]:
    """Yields the answer to each query, in order; queries in the index are not decoded again."""
    known = {path: index.stored(path) for path in queries}
    new = [path for path in queries if known[path] is None]
    scores = tagger.scores(new, step=tagger.model.frames)
    for path in queries:
        embedding, error = known[path], ""
        if embedding is None:
            found = next(scores)
            embedding, error = found.embedding, found.error
        if embedding is None:
            tally.fail(error)
            yield _Answer(path, [], error)
        else:
            tally.done += 1
            yield _Answer(path, index.search(embedding, FLAGS.k, exclude=path))


def _render(answers: Iterator[_Answer], tally: Tally) -> Iterator[str]:
    """Yields the lines of a table, JSON lines, a CSV file or a playlist."""
    from musicgenre.inference.predict import csv_line, json_line

    form = FLAGS.format
    if form == "csv":
        yield "query,rank,path,similarity,error"
    if form == "m3u":
        yield "#EXTM3U"
    listed: set[str] = set()
    for answer in answers:
        if form == "jsonl":
            rows = [
                {"path": path, "similarity": round(near, 6)} for path, near in answer.neighbours
            ]
            found = {"error": answer.error} if answer.error else {"neighbours": rows}
            yield json_line({"path": answer.path, **found})
        elif form == "csv":
            if answer.error:
                yield csv_line([answer.path, "", "", "", answer.error])
            for rank, near in enumerate(answer.neighbours, 1):
                yield csv_line([answer.path, str(rank), near.path, f"{near.similarity:.6f}", ""])
        elif form == "m3u":
            for near in answer.neighbours:
                if "\n" in near.path or "\r" in near.path:
                    tally.fail(f"{near.path!r}: a playlist cannot hold a name with a line break.")
                elif near.path not in listed:
                    listed.add(near.path)
                    yield f"#EXTINF:-1,{Path(near.path).stem} ({100 * near.similarity:.0f} %)"
                    yield near.path
        elif not answer.error:
            yield answer.path + ("" if answer.neighbours else "  (no other file in the index)")
            for rank, near in enumerate(answer.neighbours, 1):
                yield f"{rank:4}  {near.similarity:6.3f}  {near.path}"
