"""Find files that sound like a file, in an index of your music.

musicgenre similar --index=music.index --add=music/               # make the index; again after adding, changing, removing files
musicgenre similar song.mp3 --index=music.index --k=5
musicgenre similar song.mp3 --index=music.index --format=m3u --out=like_song.m3u8
find new -name '*.mp3' | musicgenre similar - --index=music.index --format=jsonl

--add embeds what is new or has changed, and takes out files below a named folder that are no longer there. Other files of the
index stay. What is done so far is kept when it is stopped; run it again to go on. An index holds one model's embeddings, and is
asked with that model. A query that is in the index is left out of its own result.
"""

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from musicgenre.cli.files import Tally, add_model, expand, load_tagger

if TYPE_CHECKING:
    from musicgenre.inference.index import EmbeddingIndex, Neighbour
    from musicgenre.inference.tagger import Tagger


class _Answer(NamedTuple):
    """A query with its neighbours, or with the reason why it has none."""

    path: str
    neighbours: "list[Neighbour]"
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "files",
        nargs="*",
        help="find the like of these: sound files, folders (all sound files below), patterns such as 'music/*.mp3', or - for a "
        "list on stdin",
    )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=1.0,
        help="shorter files are refused (default: %(default)s)",
    )
    add_model(parser)
    parser.add_argument("--index", required=True, help="the file of the index")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        help="files, a folder, a pattern or - to bring into the index; may be given several times",
    )
    parser.add_argument(
        "--k", type=int, default=10, help="neighbours of a file (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=["table", "jsonl", "csv", "m3u"],
        default="table",
        help="default: %(default)s; m3u is one playlist of the neighbours of all files given, each once",
    )
    parser.add_argument("--out", default="", help="file to write to, standard output if empty")


def run(arguments: argparse.Namespace) -> int:
    """Updates the index and asks it; returns 3 where some files failed, 2 where all did."""
    from musicgenre.errors import UserError
    from musicgenre.inference.index import EmbeddingIndex

    if arguments.k < 1:
        raise UserError(f"--k must be at least 1, not {arguments.k}.")
    if not arguments.files and not arguments.add:
        raise UserError(
            "no files: name some to find their like, or give --add=<folder> to make or update the index."
        )
    if "-" in arguments.files and "-" in arguments.add:
        raise UserError("standard input (-) can be the list of the files or of --add, not of both.")
    if arguments.out and os.path.abspath(arguments.out) == os.path.abspath(arguments.index):
        raise UserError(f"--out={arguments.out} is the index.")
    index = None
    if os.path.lexists(arguments.index) or not arguments.add:
        index = EmbeddingIndex.load(arguments.index)
    tally = Tally()
    added = expand(arguments.add, tally) if arguments.add else []
    queries = expand(arguments.files, tally) if arguments.files else []
    if not added and not queries:
        return tally.exit_code()
    tagger = load_tagger(arguments)
    index = EmbeddingIndex.of(tagger.model) if index is None else index
    index.check_model(tagger.model)
    if added:
        _update(index, tagger, added, tally, arguments)
    if queries:
        if not len(index):
            raise UserError(
                f"{arguments.index}: the index is empty; bring files into it with --add=<folder>."
            )
        _write(
            _lines(_ask(index, tagger, queries, tally, arguments.k), arguments.format, tally),
            arguments.out,
        )
    return tally.exit_code()


def _update(
    index: "EmbeddingIndex",
    tagger: "Tagger",
    files: list[str],
    tally: Tally,
    arguments: argparse.Namespace,
) -> None:
    import sys

    folders = [name for name in arguments.add if os.path.isdir(name)]
    done = index.update(
        tagger, files, folders, failed=tally.fail, save_to=arguments.index, progress=True
    )
    tally.done += done.added + done.changed + done.unchanged
    parts = [f"{count} {name}" for name, count in zip(done._fields, done, strict=True) if count]
    print(f"{arguments.index}: {len(index)} files ({', '.join(parts)})", file=sys.stderr)


def _ask(
    index: "EmbeddingIndex", tagger: "Tagger", queries: list[str], tally: Tally, k: int
) -> Iterator[_Answer]:
    """Yields the answer to each query, in order. A query that the index knows is not decoded again."""
    known = {path: index.stored(path) for path in queries}
    scores = tagger.scores(
        [path for path in queries if known[path] is None], step=tagger.model.frames
    )
    for path in queries:
        embedding = known[path]
        error = ""
        if embedding is None:
            found = next(scores)
            embedding, error = found.embedding, found.error
        if embedding is None or error:
            tally.fail(error)
            yield _Answer(path, [], error)
            continue
        tally.done += 1
        yield _Answer(path, index.search(embedding, k, exclude=path))


def _lines(answers: Iterator[_Answer], form: str, tally: Tally) -> Iterator[str]:
    """Yields the lines of a table, JSON lines, a CSV file or a playlist."""
    import json
    from pathlib import Path

    listed: set[str] = set()
    if form == "csv":
        yield "query,rank,path,similarity,error"
    if form == "m3u":
        yield "#EXTM3U"
    for query, neighbours, error in answers:
        if form == "jsonl":
            entry: dict[str, object] = {"path": query}
            if error:
                entry["error"] = error
            else:
                entry["neighbours"] = [
                    {"path": near.path, "similarity": round(near.similarity, 6)}
                    for near in neighbours
                ]
            text = json.dumps(entry, ensure_ascii=False)
            # A name that is no text is escaped: so it is valid JSON, and Python reads it back.
            yield text if text.isprintable() else json.dumps(entry)
        elif form == "csv":
            if error:
                yield _csv_line(query, "", "", "", error)
            for rank, near in enumerate(neighbours, 1):
                yield _csv_line(query, str(rank), near.path, f"{near.similarity:.6f}", "")
        elif form == "m3u":
            for near in neighbours:
                if "\n" in near.path or "\r" in near.path:
                    tally.fail(
                        f"{near.path!r}: a playlist cannot hold a name with a line break; left out."
                    )
                elif near.path not in listed:
                    listed.add(near.path)
                    yield f"#EXTINF:-1,{Path(near.path).stem} ({100 * near.similarity:.0f} %)"
                    yield near.path
        elif not error:
            yield query if neighbours else f"{query}  (no other file in the index)"
            for rank, near in enumerate(neighbours, 1):
                yield f"{rank:4}  {near.similarity:6.3f}  {near.path}"


def _csv_line(*values: str) -> str:
    import csv
    import io

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def _write(lines: Iterator[str], out: str) -> None:
    from musicgenre.files import replacing

    if not out:
        for line in lines:
            print(line, flush=True)
        return
    with (
        replacing(out) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.writelines(line + "\n" for line in lines)
