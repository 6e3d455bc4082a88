"""A trained model on clips that are changed but keep their genre; see `evaluation.robustness`."""

import itertools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from musicgenre.inference.windows import BATCH, Network, stream_windows
from musicgenre.runs.model import TrainedModel
from musicgenre.store.loader import chunk_starts
from musicgenre.studies.evaluate import versions

_GTZAN_ID = re.compile(rf"(?:^|/)((?:{'|'.join(GENRES)})\.\d{{5}})(?!\d)")

PathLike = str | os.PathLike[str]


class SoundClip(NamedTuple):
    """A clip: its name, its file, its label ("" for none) and its artist or folder."""

    clip_id: str
    path: Path
    label: str
    group: str | None


# A clip's windows, float16 `[windows, frames, bands]`, and their weights in its mean, `[windows]`.
Windows = tuple[np.ndarray, np.ndarray]


class _Probe(NamedTuple):
    """How clips of one type are read, changed and given to the network."""

    what: str
    group_name: str
    read: Callable[[int], np.ndarray]
    windows: Callable[[np.ndarray, TrainedModel], Windows]
    equalise: Callable[[np.ndarray, Any], np.ndarray]
    equalisers: Sequence[Any]
    transforms: Sequence[Transform]
    missing: Sequence[Missing]

    def variants(self, i: int, clip_id: str, seed: int) -> Iterator[np.ndarray]:
        """Yields a clip unchanged, with every change and under every equaliser."""
        clip = self.read(i)
        yield clip
        for transform in self.transforms:
            # Random numbers depend only on the seed and the names of the clip and the change.
            names = (clip_id, transform.name)
            keys = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
            yield transform.apply(clip, np.random.default_rng([seed, *keys]))
        yield from (self.equalise(clip, equaliser) for equaliser in self.equalisers)


def find_sounds(
    paths: Iterable[PathLike], *, split: str = "", labelled: bool = True
) -> list[SoundClip]:
    """Returns sound files that are named or found in folders, with their labels.

    Args:
      paths: files, whose folder's name is the label, or folders `<label>/.../<file>`, which may be
        inside split folders.
      split: which split to take where a folder has split folders; "" takes all.
      labelled: the folders' names are labels.

    Raises:
      UserError: a path that does not exist, or a folder without sound files (of that split).
    """
    found = []
    for top in map(Path, paths):
        if not top.exists():
            raise UserError(f"{top}: no such file or folder.")
        files = {top: Path(top.absolute().parent.name, top.name)}
        if top.is_dir():
            files = {path: path.relative_to(top) for path in find_audio(top)}
        firsts = {name.parts[0].lower() for name in files.values()}
        splits = len(firsts) > 1 and firsts <= SPLIT_ALIASES.keys()
        if splits and split:
            files = {p: n for p, n in files.items() if SPLIT_ALIASES[n.parts[0].lower()] == split}
        if not files:
            of = f" for the split {split!r}" if splits and split else ""
            raise UserError(f"{top}: no sound files in this folder{of}.")
        for path, name in files.items():
            folders = name.parts[1 if splits else 0 : -1]
            label = folders[0] if folders else top.absolute().name
            group = "/".join(folders) if len(folders) > 1 else None
            artist = artist_groups().get(_gtzan_id(name.as_posix()) or "", (group,))[0]
            found.append(SoundClip(name.as_posix(), path, label if labelled else "", artist))
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
    """Runs a model over sound files, unchanged and with every change of `sound_transforms`.

    The files are first mixed to mono and resampled for the front end, and then changed.

    Args:
      model: a trained model with classes or tags.
      clips: from `find_sounds`.
      tries: random equalisers, see `Robustness.equalised`.
      seconds: of a longer file the middle is taken; 0 takes all of it.
      min_seconds: shorter files are skipped.
      seed: of the random equalisers and the noise.
      progress: draw a bar.
      command: the command line, for the report.

    Raises:
      UserError: a regression, an unknown label, or no clip that can be used.
    """
    rate, resampler = model.features.sample_rate, model.features.resampler
    length = round(seconds * rate)

    def read(i: int) -> np.ndarray:
        path = clips[i].path
        samples = load_audio(path, rate, min_seconds=min_seconds, resampler=resampler).samples
        start = max(len(samples) - length, 0) // 2
        return samples[start : start + length] if length else samples

    probe = _Probe(
        "sound files",
        "artist" if any(_gtzan_id(clip.clip_id) for clip in clips) else "folder",
        read,
        sound_windows,
        lambda samples, equaliser: equalise(samples, rate, equaliser),
        random_equalisers(tries, GENTLE_EQ, seed),
        *sound_transforms(rate, seed),
    )
    return _scored(model, clips, probe, seed, progress, command)


def probe_arrays(
    model: TrainedModel,
    file: PathLike,
    *,
    tries: int = 20,
    seed: int = 0,
    progress: bool = False,
    command: str = "",
) -> Robustness:
    """Runs a model over a file of log-mels, unchanged and with every change of `mel_transforms`.

    The file is `.npz` or `.npy`, see `musicgenre.datasets.arrays.load_arrays`, and the model's
    front end gives log-mels or MFCCs in dB. The other arguments are those of `probe_sounds`.

    Raises:
      UserError: a regression, another front end, a file or labels that cannot be used, or no clip
        that can be used.
    """
    path, spec = Path(file), model.features
    if spec.kind not in ("logmel", "mfcc") or spec.compression != "db":
        takes = f"but the model takes {spec.describe()}. Test it on sound: --audio=..."
        raise UserError(f"{path}: holds log-mels in dB, {takes}")
    arrays = open_array_file(path, str(model.config.data.array_layout))
    if (bands := arrays.frames_and_bands[1]) != spec.n_mels:
        raise UserError(f"{path}: {bands} bands, but the model was trained on {spec.n_mels}.")
    rows = zip(arrays.clip_ids, arrays.labels, arrays.groups, strict=True)
    clips = [SoundClip(clip_id, path, label, group) for clip_id, label, group in rows]
    probe = _Probe(
        f"spectrograms of {path.name}",
        "artist",
        arrays.spectrogram,
        array_windows,
        lambda db, gain: reference(db + gain, spec, float(db.max())),
        [equaliser_gains(own, spec) for own in random_equalisers(tries, GENTLE_EQ, seed)],
        *mel_transforms(spec, seed),
    )
    return _scored(model, clips, probe, seed, progress, command)


def sound_windows(samples: np.ndarray, model: TrainedModel) -> Windows:
    """Returns the windows of a file's samples `[samples]` and their weights, as for tagging."""
    windows = stream_windows([samples], model.features, model)
    inputs, weights = zip(*((one.inputs, one.weight) for one in windows), strict=True)
    return np.stack(inputs), np.array(weights)


def array_windows(db: np.ndarray, model: TrainedModel) -> Windows:
    """Returns the windows of one clip's log-mels in dB `[any, mels]`, as in an evaluation."""
    spec, frames = model.features, model.frames
    fitted, length = model.layout.fit(mfcc_from_db(db, spec.n_mfcc) if spec.kind == "mfcc" else db)
    complete, windows = frames >= model.layout.frames, int(model.config.data.eval_chunks)
    starts = [0] if complete else chunk_starts(length, frames, windows)
    inputs = np.stack([fitted[start : start + frames] for start in starts]).astype(np.float16)
    return inputs, np.ones(len(inputs))


def _scored(
    model: TrainedModel,
    clips: Sequence[SoundClip],
    probe: _Probe,
    seed: int,
    progress: bool,
    command: str,
) -> Robustness:
    """Scores all variants of the clips and returns the content of the report."""
    if model.task == "regression":
        raise UserError(f"{model.workdir}: a regression makes no decisions that can change.")
    names = list(model.label_names)
    labelled = model.task == "single_label" and all(clip.label for clip in clips)
    for clip in clips if labelled else ():
        if clip.label not in names:
            raise UserError(
                f"{clip.path}, {clip.clip_id}: the model does not know the label {clip.label!r}."
                f"{did_you_mean(clip.label, names)} Test sound with other labels with --nolabels."
            )

    def make(i: int) -> list[Windows] | str:
        try:
            variants = probe.variants(i, clips[i].clip_id, seed)
            return [probe.windows(variant, model) for variant in variants]
        except UserError as error:
            return str(error)

    network, used, scores, skipped = Network(model), [], [], []
    for clip, made in zip(clips, _in_threads(make, len(clips), progress), strict=True):
        if isinstance(made, str):
            row = {"clip_id": clip.clip_id, "path": str(clip.path), "reason": made}
            skipped.append({name: _text(value) for name, value in row.items()})
            continue
        inputs, weights = zip(*made, strict=True)
        windows, ends = np.concatenate(inputs), np.cumsum([len(own) for own in weights])[:-1]
        batches = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
        found = np.concatenate([network(batch)[0] for batch in batches]).astype(np.float64)
        parts = zip(np.split(found, ends), weights, strict=True)
        scores.append(np.stack([np.average(part, axis=0, weights=own) for part, own in parts]))
        used.append(clip)
    if not used:
        first = f" The first of {len(skipped)}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"no clip can be used.{first}")
    gathered = np.stack(scores, axis=1)  # [1 + transforms + tries, clips, classes]
    outcomes = [
        Outcome(transform.name, transform.irrelevant, transform.what, found)
        for transform, found in zip(probe.transforms, gathered[1:], strict=False)
    ]
    ids = [_text(clip.clip_id) for clip in used]
    counts = Counter(clip.label for clip in used)
    by_label = ", ".join(f"{name} {counts[name]}" for name in names if counts[name])
    name, what = f"{model.workdir.name} ({model.config.model.name})", f"{len(used)} {probe.what}"
    return Robustness(
        title=f"Robustness of {name} on {what}",
        facts={
            "model": f"{name}, step {model.step}",
            "trained on": f"{model.dataset['name']}, {model.dataset['protocol']}",
            "clips": f"{what}: {by_label}" if labelled else f"{what}, without labels",
            "front end": model.features.describe(),
        },
        label_names=model.label_names,
        clip_ids=ids,
        groups=[clip.group for clip in used],
        group_name=probe.group_name,
        targets=np.array([names.index(clip.label) for clip in used]) if labelled else None,
        before=gathered[0],
        outcomes=outcomes,
        equalised=gathered[1 + len(outcomes) :],
        equaliser=f"gains of up to {GENTLE_EQ:g} dB per octave band",
        missing=[{"name": gone.name, "reason": gone.reason} for gone in probe.missing],
        skipped=skipped,
        notes=_training_notes(model, ids),
        synthetic=bool(model.dataset["synthetic"]),
        command=_text(command),
        versions=versions(),
    )


def _in_threads(make: Callable[[int], Any], count: int, progress: bool) -> Iterator[Any]:
    """Yields make(0), make(1), ... in order, computed by threads in blocks that fit in memory."""
    block = 2 * min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(block // 2) as pool:
        blocks = (range(first, min(first + block, count)) for first in range(0, count, block))
        made = itertools.chain.from_iterable(pool.map(make, numbers) for numbers in blocks)
        yield from tqdm(made, "robustness", count, unit="clip", disable=not progress)


def _gtzan_id(name: str) -> str | None:
    """Returns the GTZAN clip in a name, such as "blues.00012" in "blues/blues.00012.au"."""
    match = _GTZAN_ID.search(name)
    return match[1] if match else None


def _training_notes(model: TrainedModel, clip_ids: Sequence[str]) -> list[str]:
    """Returns which clips are known to be training clips: decisions on these are more certain."""
    names = [_gtzan_id(clip_id) or clip_id for clip_id in clip_ids]
    note = "The training clips of the model are not known: some of these clips may be among them."
    if not model.trained_on.unknown:
        own = len([name for name in names if name in set(model.trained_on.clip_ids)])
        note = f"By their names, {own} of these {len(names)} clips are training clips of the model."
    lists = fault_filtered_lists()
    counts = Counter(lists[name] for name in names if name in lists)
    named = [f"{counts[split]} of {split}" for split in ("train", "valid", "test") if counts[split]]
    on_lists = f"By their names, on GTZAN's fault-filtered lists: {', '.join(named)}."
    return [note, on_lists] if named else [note]


def _text(name: str) -> str:
    """Returns a name that may not be valid Unicode as text."""
    return name.encode("utf-8", "replace").decode()
