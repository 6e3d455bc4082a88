"""An index of embeddings in one file, kept up to date, to find similar files by cosine.

A query is compared with every file: one matrix product, then a partial sort. With random vectors of
128 numbers, k = 10 and two CPU cores, the median query took 4 to 8 ms for 100,000 files and 22 to
67 ms for 1,000,000. Decoding a query takes longer, so approximate search would gain nothing. A
million files are 0.55 GB on disk and in memory, and three times that while the index is written.

With a model and a folder: `index = EmbeddingIndex.of(tagger.model)`, `index.update(tagger, files,
save_to="music.index")`, and later
`EmbeddingIndex.load("music.index").search(tagger.embed("song.mp3"), k=10)`.

Examples:
  >>> paths = ["/music/a.mp3", "/music/b.mp3", "/music/c.mp3"]
  >>> index = EmbeddingIndex(paths, np.array([[3.0, 0], [3, 4], [0, 2]]))
  >>> [(near.path, round(near.similarity, 2)) for near in index.search(np.array([1.0, 0]), k=2)]
  [('/music/a.mp3', 1.0), ('/music/b.mp3', 0.6)]
  >>> index.search(np.array([1.0, 0]), k=1, exclude="/music/a.mp3")[0].path
  '/music/b.mp3'
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from musicgenre.errors import UserError
from musicgenre.files import arrays_digest, fingerprint, read_arrays, write_arrays

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger
    from musicgenre.runs.model import TrainedModel

PathLike = str | os.PathLike[str]

# The key of the notes in the file's metadata, and their version. Schema 1 is that of version 0.1,
# whose embeddings of long files are means without weights.
KEY, SCHEMA = "musicgenre_index", 2
# An update saves the index after this many new files.
SAVE_EVERY = 200


class Neighbour(NamedTuple):
    """A file of the index, and the cosine of its embedding and the query's, in [-1, 1]."""

    path: str
    similarity: float


class Update(NamedTuple):
    """Numbers of files in `EmbeddingIndex.update`.

    `added` are new, `changed` were embedded again, `unchanged` were not, `gone` are no longer on
    disk and were removed, and `failed` cannot be used and are not in the index.
    """

    added: int
    changed: int
    unchanged: int
    gone: int
    failed: int


class EmbeddingIndex:
    """Embeddings of sound files, tied to the model that computed them.

    Args:
      paths: the files, `[files]`, without duplicates; made absolute.
      embeddings: `[files, d]`; stored as float32 of length 1. Zeros stay zeros, with the similarity
        0 to all.
      stats: size in bytes and modification time in nanoseconds of each file when it was embedded,
        integers `[files, 2]`; -1 if unknown, as of an earlier version of this package. The next
        update embeds such files again. None for all unknown.
      model: from `describe_model`; empty if unknown.
      source: the index's file, for messages.

    Raises:
      UserError: shapes that do not match, a duplicate file, or values that are not finite.
    """

    def __init__(
        self,
        paths: Sequence[PathLike] = (),
        embeddings: np.ndarray | None = None,
        stats: np.ndarray | None = None,
        *,
        model: Mapping[str, str] | None = None,
        source: str = "",
    ) -> None:
        n = len(paths)
        values = np.zeros((n, 0), np.float32) if embeddings is None else np.asarray(embeddings)
        known = np.full((n, 2), -1, np.int64) if stats is None else np.asarray(stats, np.int64)
        if values.ndim != 2 or len(values) != n or known.shape != (n, 2):
            shapes = f"{list(values.shape)} and {list(known.shape)}"
            raise UserError(f"{n} paths need embeddings [{n}, d] and stats [{n}, 2], not {shapes}.")
        self.model, self.source = dict(model or {}), source
        self._set([os.path.abspath(path) for path in paths], _unit(values), known)
        if len(self._rows) != n:
            raise UserError("a file occurs twice among the paths of the index.")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def outdated(self) -> int:
        """How many files' embeddings an earlier version computed; `update` embeds them again."""
        return int((self.stats[:, 0] < 0).sum())

    @classmethod
    def of(cls, model: "TrainedModel") -> "EmbeddingIndex":
        """Returns an empty index of a model."""
        return cls(model=describe_model(model))

    @classmethod
    def load(cls, path: PathLike) -> "EmbeddingIndex":
        """Reads an index that `save` wrote. All files of an index of version 0.1 are outdated.

        Raises:
          UserError: the file is missing, is not an index or one of a newer version, or is damaged.
        """
        name = os.fspath(path)
        if not os.path.exists(name):
            remedy = f"Create it with: musicgenre similar --index={name} --add=<folder>"
            raise UserError(f"{name}: no such index. {remedy}")
        if not os.path.isfile(name):
            raise UserError(f"{name}: not an index, which is a single file.")
        remedy = "Delete it and create it again with --add."
        arrays, notes = read_arrays(name, key=KEY, schemas=(1, SCHEMA), what="index", remedy=remedy)
        complete = arrays.keys() == {"path", "stat", "embedding"}
        if not complete or not isinstance(notes.get("model"), dict):
            raise UserError(f"{name}: damaged: its notes or arrays are incomplete. {remedy}")
        joined = arrays["path"].tobytes()
        paths = [os.fsdecode(part) for part in joined.split(b"\0")] if joined else []
        index = cls(model=notes["model"], source=name)
        stats = arrays["stat"] if notes["schema"] == SCHEMA else np.full_like(arrays["stat"], -1)
        # Not through __init__, so that the embeddings are bit-exact.
        index._set(paths, arrays["embedding"], stats)
        return index

    def save(self, path: PathLike) -> None:
        """Writes the index to one safetensors file, atomically.

        Raises:
          UserError: the file cannot be written; an old one is unchanged.
        """
        arrays = {
            # Joined bytes keep names that are not UTF-8, and need no padding.
            "path": np.frombuffer(b"\0".join(map(os.fsencode, self.paths)), np.uint8),
            "stat": self.stats,
            "embedding": self.embeddings,
        }
        write_arrays(path, arrays, {"schema": SCHEMA, "model": self.model}, key=KEY)
        self.source = os.fspath(path)

    def check_model(self, model: "TrainedModel") -> None:
        """Checks that a model's embeddings can be compared with those of this index.

        Raises:
          UserError: the index was made with another model.
        """
        other = describe_model(model)
        if self.model.get("digest") != other["digest"]:
            made, given = (
                f"{one.get('source', 'unknown')} ({one.get('network', '?')}; "
                f"{one.get('labels', '?')})"
                for one in (self.model, other)
            )
            raise UserError(
                f"{self.source or 'the index'}: made with another model, {made}, than {given}. "
                "Pass the index's model with --model, or create another index with --add."
            )

    def search(
        self, embedding: np.ndarray, k: int, exclude: PathLike | None = None
    ) -> list[Neighbour]:
        """Returns the k most similar files, the most similar first; ties are sorted by path.

        Args:
          embedding: of the query, `[d]`, of any length but finite.
          k: how many, at least 1; an index of fewer files returns all.
          exclude: a file to leave out, such as the query itself, also by the name of a link.

        Raises:
          UserError: k is below 1, or the embedding has another shape than those of the index or is
            not finite.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}.")
        if not self.paths:
            return []
        query, width = np.asarray(embedding), list(self.embeddings.shape[1:])
        if list(query.shape) != width:
            shape = list(query.shape)
            raise UserError(f"the query's embedding is {shape}, those of the index are {width}.")
        similarity = self.embeddings @ _unit(query[None])[0]
        names = {os.path.abspath(exclude), os.path.realpath(exclude)} if exclude else ()
        left_out = [self._rows[name] for name in names if name in self._rows]
        similarity[left_out] = -np.inf
        count = min(k, len(self) - len(left_out))
        if not count:
            return []
        nearest = np.argpartition(-similarity, count - 1)[:count].tolist()
        nearest.sort(key=lambda row: (-similarity[row], self.paths[row]))
        # Rounding may exceed 1.
        clipped = np.clip(similarity[nearest], -1, 1).tolist()
        return [
            Neighbour(self.paths[row], near) for row, near in zip(nearest, clipped, strict=True)
        ]

    def stored(self, path: PathLike) -> np.ndarray | None:
        """Returns a file's embedding, float32 `[d]`; None if it is not indexed or has changed."""
        name = os.path.abspath(path)
        return self.embeddings[self._rows[name]] if self._is_current(name, _stat(path)) else None

    def update(
        self,
        tagger: "Tagger",
        files: Iterable[PathLike],
        folders: Iterable[PathLike] = (),
        *,
        failed: Callable[[str], None] | None = None,
        save_to: PathLike | None = None,
        every: int = SAVE_EVERY,
        progress: bool = False,
    ) -> Update:
        """Updates the index with files, and saves it repeatedly.

        A file is embedded if it is new or outdated, or if its size or modification time differs. A
        file that cannot be used is reported and not kept in the index. Other files of the index
        stay, except those below one of `folders` that are no longer on disk. A folder below which
        no file is given is ignored, since it may be a disk that is not mounted. Of two simultaneous
        updates of one file, the later one to finish wins.

        Args:
          tagger: with the index's model.
          files: sound files; duplicates count once.
          folders: where deleted files are removed from the index.
          failed: receives the reason why a file cannot be used.
          save_to: the index's file; None keeps it in memory.
          every: new files between two saves; for a large index at least a thousandth of its files.
          progress: show a bar on a terminal.

        Raises:
          UserError: the index belongs to another model, the network has no embedding, or the index
            cannot be written.
        """
        from tqdm import tqdm

        from musicgenre.inference.windows import no_embedding

        self.check_model(tagger.model)
        given: dict[str, PathLike] = {}
        for file in files:
            given.setdefault(os.path.abspath(file), file)
        drop = self._gone(given, folders)
        # Taken before the file is read, so that the next update notices a change in between.
        stats = {path: _stat(path) for path in given}
        waiting = [path for path in given if not self._is_current(path, stats[path])]
        counts = dict.fromkeys(Update._fields, 0)
        counts |= {"gone": len(drop), "unchanged": len(given) - len(waiting)}
        fresh: dict[str, np.ndarray] = {}

        def keep() -> None:
            if fresh or drop:
                self._replace(fresh, stats, drop)
                fresh.clear()
                drop.clear()
                if save_to is not None:
                    self.save(save_to)

        scores = tagger.scores([given[path] for path in waiting], step=tagger.model.frames)
        # Saving a large index takes seconds.
        every = max(every, len(self) // 1000)
        bar = tqdm(scores, total=len(waiting), unit="file", disable=not progress or None)
        try:
            for path, found in zip(waiting, bar, strict=True):
                error, embedding = found.error, found.embedding
                if embedding is not None and not embedding.size:
                    raise UserError(no_embedding(tagger.model))
                if embedding is None or not np.isfinite(embedding).all():
                    counts["failed"] += 1
                    if path in self._rows:
                        drop.add(path)
                    if failed is not None:
                        failed(error or f"{found.path}: its embedding is not finite.")
                    continue
                counts["changed" if path in self._rows else "added"] += 1
                fresh[path] = embedding
                if len(fresh) >= every:
                    keep()
        finally:
            keep()
        return Update(**counts)

    def _is_current(self, path: str, stat: tuple[int, int] | None) -> bool:
        row = self._rows.get(path)
        return row is not None and stat == tuple(self.stats[row].tolist())

    def _gone(self, given: Mapping[str, PathLike], folders: Iterable[PathLike]) -> set[str]:
        """Returns the files of the index below `folders` that are no longer on disk."""
        gone: set[str] = set()
        for folder in folders:
            start = os.path.join(os.path.abspath(folder), "")
            if any(path.startswith(start) for path in given):
                below = {path for path in self.paths if path.startswith(start)}
                gone |= set(filter(_is_missing, below - given.keys()))
        return gone

    def _replace(
        self,
        fresh: Mapping[str, np.ndarray],
        stats: Mapping[str, tuple[int, int] | None],
        drop: set[str],
    ) -> None:
        """Removes `drop`, and adds or replaces `fresh`."""
        out = drop | fresh.keys()
        kept = [row for row, path in enumerate(self.paths) if path not in out]
        paths = [self.paths[row] for row in kept] + list(fresh)
        embeddings, known = self.embeddings[kept], self.stats[kept]
        if fresh:
            new = _unit(np.stack(list(fresh.values())))
            embeddings = np.concatenate([embeddings, new]) if kept else new
            new_stats = np.array([stats[path] or (-1, -1) for path in fresh], np.int64)
            known = np.concatenate([known, new_stats])
        self._set(paths, embeddings, known)

    def _set(self, paths: list[str], embeddings: np.ndarray, stats: np.ndarray) -> None:
        self.paths, self.embeddings, self.stats = paths, embeddings, stats
        self._rows = {path: row for row, path in enumerate(paths)}


def model_digest(model: "TrainedModel") -> str:
    """Returns the SHA-256, in hexadecimal, of the labels and of all that an embedding depends on.

    These are the arrays, the network's fields, the front end, and the layout of clips. A run and
    its bundle have the same digest; a bundle made with `--half` has another.
    """
    import jax
    from flax.traverse_util import flatten_dict

    from musicgenre.config import to_plain

    arrays = flatten_dict(dict(jax.device_get(model.model)), sep="/")
    config = to_plain(model.config)
    parts = {
        "arrays": arrays_digest({name: np.asarray(value) for name, value in arrays.items()}),
        "network": config["model"],
        "dtype": config["dtype"],
        "labels": list(model.label_names),
        "features": model.features.to_dict(),
        "layout": dataclasses.asdict(model.layout),
        "frames": model.frames,
    }
    return fingerprint(parts, digits=64)


def describe_model(model: "TrainedModel") -> dict[str, str]:
    """Returns an index's notes on its model: `digest`, `source`, `network` and `labels`.

    The digest is that of `model_digest`; the others are for messages.
    """
    labels = list(model.label_names)
    shown = ", ".join(labels[:3]) + (f", ... {len(labels)} labels" if len(labels) > 3 else "")
    return {
        "digest": model_digest(model),
        "source": os.fsencode(model.workdir).decode("utf-8", "replace"),
        "network": str(model.config.model.name),
        "labels": shown,
    }


def _unit(values: np.ndarray) -> np.ndarray:
    """Returns rows scaled to length 1, float32 `[n, d]`; rows of zeros stay.

    Raises:
      UserError: a value is not finite.
    """
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(length).all():
        raise UserError("an embedding is not finite.")
    unit: np.ndarray = (wide / np.where(length > 0, length, 1)).astype(np.float32)
    return unit


def _stat(path: PathLike) -> tuple[int, int] | None:
    """Returns size in bytes and modification time in ns, or None if the file is unreachable."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _is_missing(path: str) -> bool:
    """Returns whether a file does not exist, as opposed to being unreachable."""
    try:
        os.stat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False
