"""Files that sound alike: an index of embeddings in one file, kept up to date, and searched by cosine.

Every query is compared with every file: one product of the matrix with the query, then a partial sort. With random vectors of 128
numbers, k = 10 and two CPU cores, idle and busy, the median query took 4 to 8 ms for 100,000 files and 22 to 67 ms for 1,000,000.
Decoding a query takes longer, so this needs no library of approximate search. A million files are 0.55 GB on disk and in memory,
three times that while it is written, and 2 to 3 s to load; at some ten million it is memory that ends it, not time.

>>> index = EmbeddingIndex(["/music/a.mp3", "/music/b.mp3", "/music/c.mp3"], np.array([[3.0, 0], [3, 4], [0, 2]]))
>>> [(near.path, round(near.similarity, 2)) for near in index.search(np.array([1.0, 0]), k=2)]
[('/music/a.mp3', 1.0), ('/music/b.mp3', 0.6)]
>>> index.search(np.array([1.0, 0]), k=1, exclude="/music/a.mp3")[0].path
'/music/b.mp3'

With a model and a folder: `index = EmbeddingIndex.of(tagger.model)`, `index.update(tagger, files, save_to="music.index")`, and
later `EmbeddingIndex.load("music.index").search(tagger.embed("song.mp3"), k=10)`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from musicgenre.errors import UserError
from musicgenre.files import fingerprint, replacing

if TYPE_CHECKING:
    from musicgenre.inference.tagger import Tagger
    from musicgenre.runs.model import TrainedModel

PathLike = str | os.PathLike[str]

# The key of the notes in the file's metadata, and their version.
KEY, SCHEMA = "musicgenre_index", 1
# New files after which an update writes what it has.
SAVE_EVERY = 200
_ARRAYS = ("path", "stat", "embedding")


class Neighbour(NamedTuple):
    """A file of the index, and the cosine of its embedding and the query's, in [-1, 1]."""

    path: str
    similarity: float


class Update(NamedTuple):
    """What `EmbeddingIndex.update` did: numbers of files.

    Attributes:
      added: not there before.
      changed: embedded again, since their size or time of change was another.
      unchanged: left as they were.
      gone: no longer on disk, and so taken out.
      failed: cannot be used, and so are not in the index.
    """

    added: int
    changed: int
    unchanged: int
    gone: int
    failed: int


class EmbeddingIndex:
    """Embeddings of sound files, tied to the model that made them.

    Args:
      paths: the files, `[files]`, each once; made absolute.
      embeddings: `[files, d]`; stored as float32 of length 1. One of zeros stays so, and has the similarity 0 to all.
      stats: size in bytes and time of change in nanoseconds of each file when it was embedded, integers `[files, 2]`; None for
        unknown ones, which the next update embeds again.
      model: from `describe_model`; empty where it is not known.
      source: the file of the index, for messages.

    Raises:
      UserError: shapes that do not fit, a file twice, or values that are not finite.
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
            raise UserError(
                f"{n} paths need embeddings [{n}, d] and stats [{n}, 2], not {list(values.shape)} and {list(known.shape)}."
            )
        self.model = dict(model or {})
        self.source = source
        self._set([os.path.abspath(path) for path in paths], _unit(values), known)
        if len(self._rows) != n:
            raise UserError("a file occurs twice among the paths of the index.")

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def of(cls, model: "TrainedModel") -> "EmbeddingIndex":
        """Returns an empty index of a model."""
        return cls(model=describe_model(model))

    @classmethod
    def load(cls, path: PathLike) -> "EmbeddingIndex":
        """Reads an index that `save` wrote.

        Raises:
          UserError: the file is missing, is no index or one of a newer version, or is damaged.
        """
        name = os.fspath(path)
        if not os.path.exists(name):
            raise UserError(
                f"{name}: no such index. Make it with: musicgenre similar --index={name} --add=<folder>"
            )
        if not os.path.isfile(name):
            raise UserError(f"{name}: not an index, which is a single file.")
        try:
            with safe_open(name, framework="numpy") as file:
                notes_text = (file.metadata() or {}).get(KEY, "")
                if not notes_text:
                    raise UserError(
                        f"{name}: not an index of this package (but another safetensors file)."
                    )
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{name}: not an index of this package, or cut short ({error})."
            ) from error
        notes = _parsed(name, notes_text)
        if arrays.keys() != set(_ARRAYS) or _checksum(arrays) != notes["sha256"]:
            raise UserError(
                f"{name}: damaged: its arrays are not those that were saved (SHA-256). Delete it and make it again with --add."
            )
        joined = arrays["path"].tobytes()
        paths = [os.fsdecode(part) for part in joined.split(b"\0")] if joined else []
        index = cls(model=notes["model"], source=name)
        # As it was saved, to the bit.
        index._set(paths, arrays["embedding"], arrays["stat"])
        return index

    def save(self, path: PathLike) -> None:
        """Writes the index to one file (safetensors), atomically.

        Raises:
          UserError: the file cannot be written; what was there is unchanged.
        """
        arrays = {
            # Joined bytes: names that are no text survive, and no name is padded to the length of the longest.
            "path": np.frombuffer(b"\0".join(map(os.fsencode, self.paths)), np.uint8),
            "stat": self.stats,
            "embedding": self.embeddings,
        }
        notes = {"schema": SCHEMA, "model": self.model, "sha256": _checksum(arrays)}
        with replacing(path) as temporary:
            # Not by save_file: it gives no one else the right to read, and no OSError where the disk is full.
            temporary.write_bytes(save(arrays, metadata={KEY: json.dumps(notes, sort_keys=True)}))
        self.source = os.fspath(path)

    def check_model(self, model: "TrainedModel") -> None:
        """Makes sure that a model's embeddings may be compared with those of this index.

        Raises:
          UserError: the index was made with another model.
        """
        other = describe_model(model)
        if self.model.get("digest") != other["digest"]:
            made, given = (
                f"{one.get('source', 'unknown')} ({one.get('network', '?')}; {one.get('labels', '?')})"
                for one in (self.model, other)
            )
            raise UserError(
                f"{self.source or 'the index'}: made with another model, {made}. The one given is {given}. Embeddings of two "
                "models cannot be compared: give the index's with --model, or make another index with --add."
            )

    def search(
        self, embedding: np.ndarray, k: int, exclude: PathLike | None = None
    ) -> list[Neighbour]:
        """Returns the k files that are most alike, the most similar first; all where there are fewer. Equals go by their path.

        Args:
          embedding: of the query, `[d]`, of any length but finite.
          k: how many, at least 1.
          exclude: a file that is left out, such as the query itself; its links count as it does.

        Raises:
          UserError: k is below 1, or the embedding has another shape than those of the index or is not finite.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}.")
        if not self.paths:
            return []
        query = np.asarray(embedding)
        if query.shape != self.embeddings.shape[1:]:
            raise UserError(
                f"the query's embedding is {list(query.shape)}, those of the index are {list(self.embeddings.shape[1:])}."
            )
        similarity = self.embeddings @ _unit(query[None])[0]
        left_out = []
        if exclude is not None:
            names = {os.path.abspath(exclude), os.path.realpath(exclude)}
            left_out = [self._rows[name] for name in names if name in self._rows]
        similarity[left_out] = -np.inf
        count = min(k, len(self) - len(left_out))
        if not count:
            return []
        nearest = np.argpartition(-similarity, count - 1)[:count].tolist()
        nearest.sort(key=lambda row: (-similarity[row], self.paths[row]))
        # Rounding may lead a little past 1.
        return [
            Neighbour(self.paths[row], float(np.clip(similarity[row], -1, 1))) for row in nearest
        ]

    def stored(self, path: PathLike) -> np.ndarray | None:
        """Returns the embedding of a file, float32 `[d]`, or None where the index lacks the file or it has changed since."""
        row = self._rows.get(os.path.abspath(path))
        if row is None or _stat(path) != tuple(self.stats[row].tolist()):
            return None
        return self.embeddings[row]

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
        """Brings the index up to date with files.

        A file is embedded where it is new or has another size or time of change. One that cannot be used is reported and is not
        in the index afterwards, even if an older state of it was. Other files of the index stay, but for those below one of
        `folders` that are no longer on disk. A folder below which no file is given is left alone: it may be a disk that is not
        there. What is finished survives any interruption: it is written every so many files and at the end, however that comes.
        Of two updates of one index at the same time, the later one to finish is kept.

        Args:
          tagger: with the index's model.
          files: sound files; each counts once.
          folders: where files that have gone are taken out.
          failed: is told why a file cannot be used.
          save_to: the file of the index; None keeps it in memory.
          every: new files from one writing to the next; of a large index at least a thousandth of its files.
          progress: show a bar on a terminal.

        Raises:
          UserError: the index is another model's, the network gives no embedding, or the index cannot be written.
        """
        from tqdm import tqdm

        self.check_model(tagger.model)
        given: dict[str, PathLike] = {}
        for file in files:
            given.setdefault(os.path.abspath(file), file)
        drop = self._gone(given, folders)
        # Taken before the file is read, so that a change in between is seen the next time.
        stats = {path: _stat(path) for path in given}
        waiting = [
            path
            for path in given
            if path not in self._rows or stats[path] != tuple(self.stats[self._rows[path]].tolist())
        ]
        counts = dict.fromkeys(Update._fields, 0) | {
            "gone": len(drop),
            "unchanged": len(given) - len(waiting),
        }
        fresh: dict[str, Any] = {}

        def keep() -> None:
            if not fresh and not drop:
                return
            self._replace(fresh, stats, drop)
            fresh.clear()
            drop.clear()
            if save_to is not None:
                self.save(save_to)

        scores = tagger.scores([given[path] for path in waiting], step=tagger.model.frames)
        # To write a large index takes seconds.
        every = max(every, len(self) // 1000)
        try:
            for path, found in zip(
                waiting,
                tqdm(scores, total=len(waiting), unit="file", disable=not progress or None),
                strict=True,
            ):
                error = found.error or _problem(found.embedding, found.path, tagger.model)
                if error:
                    counts["failed"] += 1
                    if path in self._rows:
                        drop.add(path)
                    if failed is not None:
                        failed(error)
                    continue
                counts["changed" if path in self._rows else "added"] += 1
                fresh[path] = found.embedding
                if len(fresh) >= every:
                    keep()
        finally:
            keep()
        return Update(**counts)

    def _gone(self, given: Mapping[str, Any], folders: Iterable[PathLike]) -> set[str]:
        gone: set[str] = set()
        for folder in folders:
            start = os.path.join(os.path.abspath(folder), "")
            if any(path.startswith(start) for path in given):
                gone.update(
                    path
                    for path in self.paths
                    if path.startswith(start) and path not in given and _is_missing(path)
                )
        return gone

    def _replace(
        self, fresh: Mapping[str, np.ndarray], stats: Mapping[str, Any], drop: set[str]
    ) -> None:
        """Takes out `drop` and puts `fresh` in, in place of what was there of it."""
        kept = [
            row for row, path in enumerate(self.paths) if path not in drop and path not in fresh
        ]
        paths = [self.paths[row] for row in kept] + list(fresh)
        embeddings, known = self.embeddings[kept], self.stats[kept]
        if fresh:
            new = np.stack(list(fresh.values()))
            embeddings = np.concatenate([embeddings, _unit(new)]) if kept else _unit(new)
            known = np.concatenate(
                [known, np.array([stats[path] or (-1, -1) for path in fresh], np.int64)]
            )
        self._set(paths, embeddings, known)

    def _set(self, paths: list[str], embeddings: np.ndarray, stats: np.ndarray) -> None:
        self.paths, self.embeddings, self.stats = paths, embeddings, stats
        self._rows = {path: row for row, path in enumerate(paths)}


def model_digest(model: "TrainedModel") -> str:
    """Returns the SHA-256 of all that an embedding depends on, in hexadecimal, and of the labels.

    These are the arrays, the network's fields, the front end, and how clips are cut. A run and a bundle made of it have the same
    digest; a bundle made with `--half` has another.
    """
    import jax
    from flax.traverse_util import flatten_dict

    from musicgenre.config import to_plain
    from musicgenre.files import arrays_digest

    arrays = {
        name: np.asarray(value)
        for name, value in flatten_dict(dict(jax.device_get(model.model)), sep="/").items()
    }
    config = to_plain(model.config)
    parts = {
        "arrays": arrays_digest(arrays),
        "network": config["model"],
        "dtype": config["dtype"],
        "labels": list(model.label_names),
        "features": model.features.to_dict(),
        "layout": dataclasses.asdict(model.layout),
        "frames": model.frames,
    }
    return fingerprint(parts, digits=64)


def describe_model(model: "TrainedModel") -> dict[str, str]:
    """Returns what an index keeps of its model: `digest` (see `model_digest`), and for people `source`, `network`, `labels`."""
    labels = list(model.label_names)
    shown = ", ".join(labels[:3]) + (f", ... {len(labels)} labels" if len(labels) > 3 else "")
    return {
        "digest": model_digest(model),
        "source": str(model.workdir),
        "network": str(model.config.model.name),
        "labels": shown,
    }


def no_embedding(model: "TrainedModel") -> str:
    """Returns the message for a network that gives no embedding."""
    return (
        f"the model {model.config.model.name!r} sows no embedding; see README, 'Your own network'."
    )


def _problem(embedding: Any, path: str, model: "TrainedModel") -> str:
    """Returns why an embedding cannot be kept, or "" where it can.

    Raises:
      UserError: the network gives none.
    """
    if not embedding.size:
        raise UserError(no_embedding(model))
    return "" if np.isfinite(embedding).all() else f"{path}: its embedding is not finite."


def _unit(values: np.ndarray) -> np.ndarray:
    """Returns rows of length 1, float32 `[n, d]`; those of zeros stay.

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
    """Returns size in bytes and time of change in nanoseconds, or None where the file cannot be reached."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _is_missing(path: str) -> bool:
    """Returns whether a file is certainly no longer there, not merely out of reach."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        notes: dict[str, Any] = json.loads(text)
        schema = notes["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: damaged: its notes cannot be read ({error}).") from error
    if schema != SCHEMA:
        raise UserError(
            f"{name}: schema {schema!r} is not the one that this version reads ({SCHEMA}). Update musicgenre."
        )
    if not isinstance(notes.get("model"), dict) or "sha256" not in notes:
        raise UserError(
            f"{name}: damaged: its notes are incomplete. Delete it and make it again with --add."
        )
    return notes
