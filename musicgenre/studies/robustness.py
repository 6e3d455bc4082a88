"""A trained model on clips that were changed without changing their genre; see `musicgenre.evaluation.robustness`."""

import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from musicgenre.audio.decode import load_audio
from musicgenre.audio.features import mfcc_from_db
from musicgenre.audio.perturb_mels import equaliser_gains, mel_transforms, reference
from musicgenre.audio.perturb_sound import (
    GENTLE_EQ,
    Missing,
    Transform,
    equalise,
    random_equalisers,
    sound_transforms,
)
from musicgenre.datasets.arrays import open_array_file
from musicgenre.datasets.base import SPLIT_ALIASES, find_audio
from musicgenre.datasets.gtzan import GENRES, artist_groups, fault_filtered_lists
from musicgenre.errors import UserError, did_you_mean
from musicgenre.evaluation.robustness import Outcome, Robustness
from musicgenre.inference.windows import BATCH, Network, file_inputs
from musicgenre.runs.model import TrainedModel
from musicgenre.store.loader import chunk_starts
from musicgenre.studies.evaluate import versions

_GTZAN_ID = re.compile(rf"(?:^|/)((?:{'|'.join(GENRES)})\.\d{{5}})(?!\d)")


class SoundClip(NamedTuple):
    """A sound file: what to call it, where it is, its label ("" where none is wanted) and its artist or folder."""

    clip_id: str
    path: Path
    label: str
    group: str | None


class _Made(NamedTuple):
    """A clip, changed in every way, as inputs of the network: float16 `[windows, frames, bands]` for each way."""

    clip_id: str
    path: str
    group: str | None
    target: int
    variants: list[np.ndarray]
    error: str = ""


def find_sounds(
    places: Iterable[str | os.PathLike[str]], *, split: str = "", labelled: bool = True
) -> list[SoundClip]:
    """Returns the sound files that are named or lie below folders, with their labels.

    Args:
      places: files, whose folder's name is the label, or folders `<label>/.../<file>`, which may lie in split folders.
      split: which split to take where a folder has split folders; "" takes all.
      labelled: the folders' names are labels.

    Raises:
      UserError: a place that does not exist, or a folder without sound files (of that split).
    """
    found = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place}: no such file or folder.")
        if not place.is_dir():
            label = place.absolute().parent.name
            found.append(_sound(place, f"{label}/{place.name}", label if labelled else "", None))
            continue
        files = find_audio(place)
        tops = {path.relative_to(place).parts[0].lower() for path in files}
        given = len(tops) > 1 and all(name in SPLIT_ALIASES for name in tops)
        count = len(found)
        for path in files:
            relative = path.relative_to(place)
            if given and split and SPLIT_ALIASES[relative.parts[0].lower()] != split:
                continue
            folders = relative.parts[1 if given else 0 : -1]
            label = folders[0] if folders else place.absolute().name
            group = "/".join(folders) if len(folders) > 1 else None
            found.append(_sound(path, relative.as_posix(), label if labelled else "", group))
        if len(found) == count:
            raise UserError(
                f"{place}: no sound files in this folder"
                + (f" for the split {split!r}." if given and split else ".")
            )
    return found


def probe_sounds(
    model: TrainedModel,
    clips: Sequence[SoundClip],
    *,
    tries: int = 20,
    seconds: float = 60.0,
    min_seconds: float = 1.0,
    seed: int = 0,
    progress: bool = False,
    command: str = "",
) -> Robustness:
    """Runs a model over sound files as they are and changed in every way of `sound_transforms`.

    The files are mixed down and resampled for the front end first, as for any model of this package. That is what is changed.

    Args:
      model: a trained model with classes or tags.
      clips: from `find_sounds`.
      tries: random equalisers, see `Robustness.equalised`.
      seconds: of a longer file its middle is taken; 0 takes all of it.
      min_seconds: shorter files are skipped.
      seed: of the random equalisers and the noise.
      progress: draw a bar.
      command: what was typed, for the report.

    Raises:
      UserError: a regression, an unknown label, or no clip that can be used.
    """
    labelled = _labelled(model) and all(clip.label for clip in clips)
    if labelled:
        for clip in clips:
            _check_label(model, str(clip.path), clip.label)
    spec = model.features
    transforms, missing = sound_transforms(spec.sample_rate, seed)
    equalisers = random_equalisers(tries, GENTLE_EQ, seed)

    def variants(clip: SoundClip) -> _Made:
        target = model.label_names.index(clip.label) if labelled else -1
        try:
            samples = load_audio(
                clip.path, spec.sample_rate, min_seconds=min_seconds, resampler=spec.resampler
            ).samples
            samples = _middle(samples, round(seconds * spec.sample_rate))
            made = [samples, *_changed(samples, transforms, clip.clip_id, seed)]
            made += [equalise(samples, spec.sample_rate, equaliser) for equaliser in equalisers]
        except UserError as error:
            return _Made(clip.clip_id, str(clip.path), clip.group, target, [], str(error))
        return _Made(
            clip.clip_id,
            str(clip.path),
            clip.group,
            target,
            [file_inputs(changed, model) for changed in made],
        )

    known = any(clip.clip_id and _gtzan_id(clip.clip_id) for clip in clips)
    return _scored(
        model,
        _in_threads(variants, clips, progress),
        transforms,
        missing,
        tries,
        labelled=labelled,
        what="sound files",
        group_name="artist" if known else "folder",
        command=command,
    )


def probe_arrays(
    model: TrainedModel,
    file: str | os.PathLike[str],
    *,
    tries: int = 20,
    seed: int = 0,
    progress: bool = False,
    command: str = "",
) -> Robustness:
    """Runs a model over a file of log-mel spectrograms as they are and changed in every way of `mel_transforms`.

    Args:
      model: a trained model with classes or tags, whose front end gives log-mels or MFCCs in dB.
      file: `.npz` or `.npy`, see `musicgenre.datasets.arrays.load_arrays`.
      tries: random equalisers, see `Robustness.equalised`.
      seed: of the random equalisers and the noise.
      progress: draw a bar.
      command: what was typed, for the report.

    Raises:
      UserError: a regression, another front end, a file or labels that cannot be used, or no clip that can be used.
    """
    labelled = _labelled(model)
    path, spec = Path(file), model.features
    if spec.kind not in ("logmel", "mfcc") or spec.compression != "db":
        raise UserError(
            f"{path}: holds log-mels in dB, but the model takes {spec.describe()}. Test it on sound: --audio=..."
        )
    arrays = open_array_file(path, str(model.config.data.array_layout))
    if (bands := arrays.frames_and_bands[1]) != spec.n_mels:
        raise UserError(f"{path}: {bands} bands, but the model was trained on {spec.n_mels}.")
    if labelled:
        for clip_id, label in zip(arrays.clip_ids, arrays.labels, strict=True):
            _check_label(model, f"{path}, {clip_id}", label)
    transforms, missing = mel_transforms(spec, seed)
    gains = [
        equaliser_gains(equaliser, spec) for equaliser in random_equalisers(tries, GENTLE_EQ, seed)
    ]

    def variants(row: int) -> _Made:
        clip_id, group = arrays.clip_ids[row], arrays.groups[row]
        target = model.label_names.index(arrays.labels[row]) if labelled else -1
        try:
            db = arrays.spectrogram(row)
        except UserError as error:
            return _Made(clip_id, str(path), group, target, [], str(error))
        made = [db, *_changed(db, transforms, clip_id, seed)]
        made += [reference(db + gain, spec, float(db.max())) for gain in gains]
        return _Made(
            clip_id, str(path), group, target, [array_inputs(changed, model) for changed in made]
        )

    return _scored(
        model,
        _in_threads(variants, range(len(arrays.clip_ids)), progress),
        transforms,
        missing,
        tries,
        labelled=labelled,
        what=f"spectrograms of {path.name}",
        group_name="artist",
        command=command,
    )


def array_inputs(db: np.ndarray, model: TrainedModel) -> np.ndarray:
    """Returns what the network takes of one clip's log-mels in dB `[any, mels]`, float16 `[inputs, frames, bands]`.

    As in an evaluation: one clip of the model's length, or its crops.
    """
    spec, frames = model.features, model.frames
    fitted, length = model.layout.fit(mfcc_from_db(db, spec.n_mfcc) if spec.kind == "mfcc" else db)
    starts = (
        chunk_starts(length, frames, int(model.config.data.eval_chunks))
        if frames < model.layout.frames
        else [0]
    )
    return np.stack([fitted[start : start + frames] for start in starts]).astype(np.float16)


def _scored(
    model: TrainedModel,
    clips: Iterable[_Made],
    transforms: Sequence[Transform],
    missing: Sequence[Missing],
    tries: int,
    *,
    labelled: bool,
    what: str,
    group_name: str,
    command: str,
) -> Robustness:
    """Runs the network over clips and gathers what the report needs."""
    network = Network(model)
    used: list[_Made] = []
    scores: list[np.ndarray] = []
    skipped = []
    for clip in clips:
        if clip.error:
            skipped.append(
                {
                    "clip_id": _text(clip.clip_id),
                    "path": _text(clip.path),
                    "reason": _text(clip.error),
                }
            )
            continue
        counts = [len(inputs) for inputs in clip.variants]
        windows = np.concatenate(clip.variants)
        found = np.concatenate(
            [network(windows[start : start + BATCH])[0] for start in range(0, len(windows), BATCH)]
        )
        parts = np.split(found, np.cumsum(counts)[:-1])
        scores.append(np.stack([part.mean(axis=0, dtype=np.float64) for part in parts]))
        used.append(clip._replace(variants=[]))
    if not used:
        first = f" The first of {len(skipped)}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"no clip can be used.{first}")
    # [1 + transforms + tries, clips, classes]
    gathered = np.stack(scores, axis=1)
    outcomes = [
        Outcome(transform.name, transform.irrelevant, transform.what, found)
        for transform, found in zip(transforms, gathered[1:], strict=False)
    ]
    ids = [_text(clip.clip_id) for clip in used]
    dataset = model.dataset
    name = f"{model.workdir.name} ({model.config.model.name})"
    return Robustness(
        title=f"Does it listen to the music? {name} on {len(used)} {what}",
        facts={
            "model": f"{name}, step {model.step}",
            "trained on": f"{dataset['name']}, {dataset['protocol']}",
            "clips": f"{len(used)} {what}"
            + ("" if labelled else ", without labels")
            + _by_label(model, used, labelled),
            "front end": model.features.describe(),
        },
        label_names=model.label_names,
        clip_ids=ids,
        groups=[clip.group for clip in used],
        group_name=group_name,
        targets=np.array([clip.target for clip in used]) if labelled else None,
        before=gathered[0],
        outcomes=outcomes,
        equalised=gathered[1 + len(outcomes) :],
        equaliser=f"gains of up to {GENTLE_EQ:g} dB an octave band",
        missing=[{"name": gone.name, "reason": gone.reason} for gone in missing],
        skipped=skipped,
        notes=_training_notes(model, ids),
        synthetic=bool(dataset["synthetic"]),
        command=_text(command),
        versions=versions(),
    )


def _changed(
    clip: np.ndarray, transforms: Iterable[Transform], clip_id: str, seed: int
) -> Iterator[np.ndarray]:
    """Yields a clip changed in each way. Chance depends on the seed, the clip's name and the change's alone."""
    for transform in transforms:
        names = [
            zlib.crc32(name.encode("utf-8", "surrogateescape"))
            for name in (clip_id, transform.name)
        ]
        yield transform.apply(clip, np.random.default_rng([seed, *names]))


def _in_threads(
    make: Callable[[Any], _Made], items: Sequence[Any], progress: bool
) -> Iterator[_Made]:
    """Yields what `make` makes of each item, in order; the next ones are made while the network works."""
    threads = min(4, os.cpu_count() or 1)
    waiting: deque[Future[_Made]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(items), unit="clip", desc="robustness", disable=not progress) as bar,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()
        finally:
            for future in waiting:
                future.cancel()


def _labelled(model: TrainedModel) -> bool:
    """Says whether a clip has one label that the model could name.

    Raises:
      UserError: the model gives numbers, which are no decisions.
    """
    if model.task == "regression":
        raise UserError(
            f"{model.workdir}: a regression makes no decisions that a change could alter."
        )
    return model.task == "single_label"


def _check_label(model: TrainedModel, where: str, label: str) -> None:
    if label not in model.label_names:
        raise UserError(
            f"{where}: the model does not know the label {label!r}.{did_you_mean(label, model.label_names)} "
            "Sound without labels that it knows can be tested with --nolabels."
        )


def _sound(path: Path, clip_id: str, label: str, group: str | None) -> SoundClip:
    """Returns a sound file's clip; one of GTZAN's has its artist as the group."""
    known = artist_groups().get(_gtzan_id(clip_id) or "")
    return SoundClip(clip_id, path, label, known[0] if known else group)


def _gtzan_id(name: str) -> str | None:
    """Returns the GTZAN clip that a name is of, such as "blues.00012" of "blues/blues.00012.au"."""
    match = _GTZAN_ID.search(name)
    return match[1] if match else None


def _middle(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns the middle `length` samples; all of them where there are fewer, or `length` is 0."""
    start = max(len(samples) - length, 0) // 2 if length else 0
    return samples[start : start + length] if length else samples


def _by_label(model: TrainedModel, clips: Sequence[_Made], labelled: bool) -> str:
    """Returns ": blues 1, classical 21"."""
    if not labelled:
        return ""
    counts = np.bincount([clip.target for clip in clips], minlength=len(model.label_names))
    named = [
        f"{name} {count}" for name, count in zip(model.label_names, counts, strict=True) if count
    ]
    return ": " + ", ".join(named)


def _training_notes(model: TrainedModel, clip_ids: Sequence[str]) -> list[str]:
    """Returns what is known of clips that the model was trained on, whose decisions are surer than those of others."""
    notes = []
    names = [_gtzan_id(clip_id) or clip_id for clip_id in clip_ids]
    if model.trained_on.unknown:
        notes.append(
            "What the model was trained on is not known clip by clip: some of these clips may be among it."
        )
    else:
        trained = set(model.trained_on.clip_ids)
        own = sum(name in trained for name in names)
        notes.append(
            f"{own} of these {len(names)} clips are, by their names, among those that the model was trained on."
        )
    lists = fault_filtered_lists()
    counts = {
        split: sum(lists.get(name) == split for name in names)
        for split in ("train", "valid", "test")
    }
    if any(counts.values()):
        named = ", ".join(f"{count} of {split}" for split, count in counts.items() if count)
        notes.append(f"By their names these clips are on GTZAN's fault-filtered lists: {named}.")
    return notes


def _text(name: str) -> str:
    """Returns a name that may be no text, as text."""
    return name.encode("utf-8", "replace").decode()
