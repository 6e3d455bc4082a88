"""musicnn's published weights (Pons and Serra 2019), read from the wheel without TensorFlow.

The wheel `musicnn` 0.1.0 holds four models: MTT_musicnn and MTT_vgg predict 50 tags of
MagnaTagATune, MSD_musicnn and MSD_vgg 50 tags of the Million Song Dataset. The labels and the front
end come from `configuration.py`, which is parsed and never run, and the frames of an input from
`config.json`. Members of the wheel are read into memory; nothing is unpacked.

Source: J. Pons, X. Serra, "musicnn: pre-trained convolutional neural networks for music audio
tagging", arXiv:1909.06654. The weights are Universitat Pompeu Fabra's, under the ISC licence, whose
notice goes into each model's card.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.config import base_config, to_plain
from musicgenre.errors import UserError, did_you_mean
from musicgenre.exchange.tf_checkpoint import read_checkpoint
from musicgenre.runs.bundle import SUFFIX, save_bundle
from musicgenre.runs.notes import TrainedModel, model_of_notes, saved_shapes

# The last one comes with the source code only, not with the wheel.
MODELS = ("MTT_musicnn", "MSD_musicnn", "MTT_vgg", "MSD_vgg", "MSD_musicnn_big")
_HINT = "Fetch it with: pip download --no-deps musicnn==0.1.0"
# The wheel's largest file has 9.5 MB; a damaged archive must not fill the memory.
_LARGEST = 2**28
_COPYRIGHT = (
    "Copyright (c) Music Technology Group, Universitat Pompeu Fabra 2019. "
    "Code developed by Jordi Pons. ISC licence."
)
_DATASETS = {
    "MTT": ("mtat", "MagnaTagATune", "all clips: 18,709 train, 1,825 validation, 5,329 test"),
    "MSD": ("msd", "Million Song Dataset with Last.fm tags", "the original's"),
}
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError)


class Source:
    """The files of the Python package `musicnn`, in a wheel or in a folder.

    Args:
      path: a wheel, the package's folder, or a folder that holds either.

    Raises:
      UserError: there is no such package.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            for folder in (self.path, self.path / "musicnn"):
                if (folder / "configuration.py").is_file():
                    self.path = self._root = folder
                    return
            wheels = sorted(self.path.glob("musicnn-*.whl"))
            if len(wheels) != 1:
                raise UserError(
                    f"{self.path}: holds no musicnn/configuration.py, and {len(wheels)} wheels "
                    f"musicnn-*.whl. Name the wheel or the package's folder. {_HINT}"
                )
            self.path = wheels[0]
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file or folder. {_HINT}")
        try:
            archive = zipfile.ZipFile(self.path)
        except _ZIP_ERRORS as error:
            raise UserError(f"{self.path}: not a wheel ({error}). {_HINT}") from error
        members = archive.namelist()
        if "musicnn/configuration.py" not in members:
            raise UserError(f"{self.path}: holds no musicnn/configuration.py. {_HINT}")
        if len(set(members)) < len(members):
            raise UserError(f"{self.path}: two of its members have the same name. {_HINT}")
        # It has the methods of a Path that are used here.
        self._root = cast(Path, zipfile.Path(archive, "musicnn/"))

    def has(self, name: str) -> bool:
        """Returns whether the package has a file, by its name relative to the package."""
        return (self._root / name).is_file()

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file, by its name relative to the package.

        Raises:
          UserError: it is missing, damaged or far too large.
        """
        return self._read(self._root / name)

    def notice(self) -> str:
        """Returns the licence's text, or the copyright line if it is not among the files."""
        nearby = [folder for folder in self._root.parent.iterdir() if folder.is_dir()]
        installed = [folder for folder in nearby if folder.name.startswith("musicnn-")]
        for file in [file for folder in (self._root, *installed) for file in folder.iterdir()]:
            if file.name.startswith("LICENSE"):
                return self._read(file).decode("utf-8", "replace").strip()
        return _COPYRIGHT

    def _read(self, path: Path) -> bytes:
        if not path.is_file():
            raise UserError(f"{path}: no such file. {_HINT}")
        try:
            with path.open("rb") as file:
                content = file.read(_LARGEST + 1)
        except _ZIP_ERRORS as error:
            raise UserError(f"{path}: cannot be read ({error}). {_HINT}") from error
        if len(content) > _LARGEST:
            raise UserError(f"{path}: more than {_LARGEST} bytes, too many for musicnn. {_HINT}")
        return content


def available(source: Source) -> list[str]:
    """Returns the names of the models in a package; raises UserError if there is none."""
    found = [name for name in MODELS if source.has(f"{name}/.index")]
    if not found:
        raise UserError(f"{source.path}: holds none of the models {', '.join(MODELS)}. {_HINT}")
    return found


def read_model(source: Source, name: str) -> TrainedModel:
    """Reads the model `name`, one of `MODELS`, with a card.

    Raises:
      UserError: the name is not known, or a file is missing, damaged or of another network.
    """
    if name not in MODELS:
        raise UserError(f"{name!r} is not a model of musicnn." + did_you_mean(name, MODELS))
    setup = _configuration(source)
    dataset, corpus, split = _DATASETS[name[:3]]
    labels = setup[f"{name[:3]}_LABELS"]
    frames = _frames(source, name)
    spec = FeatureSpec(
        sample_rate=setup["SR"],
        n_fft=setup["FFT_SIZE"],
        hop_length=setup["FFT_HOP"],
        n_mels=setup["N_MELS"],
        compression="log10000",
        resampler="kaiser_best",
    )
    variables = read_checkpoint(source.read, f"{name}/")
    where = f"{source.path}: {name}"
    fields = _fields(variables, name, where)
    config = base_config()
    config.data.update(dataset=dataset, frames=frames, normalise="none")
    config.features = ConfigDict(spec.to_dict())
    config.model = ConfigDict(models.resolve(fields))
    notes = {
        "config": to_plain(config),
        "label_names": labels,
        "task": "multi_label",
        "features": spec.to_dict(),
        "layout": {"frames": frames},
        "dataset": {"name": dataset, "protocol": split, "task": "multi_label", "synthetic": False},
        "metric": "",
        "measure": None,
    }
    converted = _converted(variables, saved_shapes(notes)["variables"], name, where)
    norm = {"mean": np.zeros((1, spec.bands), np.float32), "std": np.ones((1, spec.bands), "f4")}
    value = {"variables": converted, "norm": norm}
    model = model_of_notes(notes, value, workdir=source.path, step=0, which="last")
    return dataclasses.replace(model, card=_card(source, name, model, corpus))


def import_models(
    source: Source, names: Iterable[str], out: str | os.PathLike[str]
) -> Iterator[Path]:
    """Writes models as bundles and yields the path `<out>/<name>.safetensors` of each."""
    for name in names:
        path = Path(out) / f"{name}{SUFFIX}"
        save_bundle(read_model(source, name), path)
        yield path


def _card(source: Source, name: str, model: TrainedModel, corpus: str) -> str:
    digest = hashlib.sha256(source.read(f"{name}/.data-00000-of-00001")).hexdigest()
    seconds = model.frames * model.features.hop_length / model.features.sample_rate
    return f"""\
# {name}

- Origin: {name} of musicnn 0.1.0 (J. Pons, X. Serra, arXiv:1909.06654), converted from its \
TensorFlow checkpoint (SHA-256 {digest})
- Task: {model.task}, {len(model.label_names)} outputs
- Data: {corpus}; split: {model.dataset["protocol"]}
- Measured, as published with the weights: {_reported(source, name)}
- Input: {seconds:.2f} s windows ({model.frames} frames x {model.features.bands} bands)
- Front end: {model.features.describe()}
- Labels in the order of the outputs: {", ".join(model.label_names)}
- Limits: it knows only these labels and gives each a probability for any sound.
- Licence: ISC

{source.notice()}
"""


def _configuration(source: Source) -> dict[str, Any]:
    """Returns the literals that `configuration.py` assigns: the front end and the labels."""
    where = f"{source.path}: configuration.py"
    unreadable = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
    try:
        tree = ast.parse(source.read("configuration.py"))
    except unreadable as error:
        raise UserError(f"{where} is not Python ({error}). {_HINT}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with contextlib.suppress(*unreadable):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    for name in ("SR", "FFT_HOP", "FFT_SIZE", "N_MELS"):
        _check_positive(found.get(name), f"{where}: {name}")
    for name in ("MTT_LABELS", "MSD_LABELS"):
        labels = found.get(name)
        if not isinstance(labels, list) or not labels or not all(map(_is_text, labels)):
            raise UserError(f"{where}: {name} must be a list of labels. {_HINT}")
        if len(set(labels)) < len(labels):
            raise UserError(f"{where}: {name} holds a label twice. {_HINT}")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _check_positive(value: Any, what: str) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{what} must be a positive number, not {value!r}. {_HINT}")


def _frames(source: Source, name: str) -> int:
    """Returns the frames of one input, from `config.json`."""
    where = f"{source.path}: {name}/config.json"
    try:
        config = json.loads(source.read(f"{name}/config.json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}). {_HINT}") from error
    config = config if isinstance(config, dict) else {}
    _check_positive(config.get("n_frames"), f"{where}: n_frames")
    if (processing := config.get("pre_processing")) != "logC":
        raise UserError(f"{where}: pre_processing must be 'logC', not {processing!r}. {_HINT}")
    return int(config["n_frames"])


def _reported(source: Source, name: str) -> str:
    """Returns the published test results: ROC-AUC and PR-AUC, means over the tags."""
    if source.has(f"{name}/experiment.result"):
        text = source.read(f"{name}/experiment.result").decode("utf-8", "replace")
        values = [float(value) for value in re.findall(r"AUC: *(\d+\.\d+)\s*$", text, re.MULTILINE)]
        if len(values) == 2:
            return f"ROC-AUC {values[0]:.4f}, PR-AUC {values[1]:.4f} on the test split"
    return "not stated"


def _layers(name: str) -> dict[str, str]:
    """Returns the original's name of every layer with weights, by its name here."""
    if name.endswith("vgg"):
        found = {f"conv{i}": f"{i}CNN" for i in range(1, 6)}
        numbered = {"dense": ["head"]}
        norms = ["input", *found]
    else:
        layers = ["timbral1", "timbral2", "temporal1", "temporal2", "temporal3"]
        layers += ["mid1", "mid2", "mid3"]
        found, numbered = {}, {"conv2d": layers, "dense": ["dense1", "head"]}
        norms = ["input", *layers, "pool", "dense1"]
    numbered["batch_normalization"] = [f"{layer}_norm" for layer in norms]
    for theirs, ours in numbered.items():
        found |= {layer: f"{theirs}_{i}" if i else theirs for i, layer in enumerate(ours)}
    return found


def _fields(variables: Mapping[str, np.ndarray], name: str, where: str) -> dict[str, Any]:
    """Returns the config's model section for the sizes that the variables have."""

    def size(variable: str, axis: int) -> int:
        if variable not in variables or variables[variable].ndim <= axis:
            raise UserError(f"{where}: no kernel {variable!r} of {axis + 1} axes or more. {_HINT}")
        return int(variables[variable].shape[axis])

    if name.endswith("vgg"):
        return {"name": "vgg", "filters": size("1CNN/kernel", 3)}
    return {
        "name": "musicnn",
        "timbral_filters": size("conv2d/kernel", 3),
        "timbral_width": size("conv2d/kernel", 0),
        "temporal_filters": size("conv2d_2/kernel", 3),
        "temporal_widths": tuple(size(f"conv2d_{i}/kernel", 0) for i in (2, 3, 4)),
        "mid_filters": size("conv2d_5/kernel", 3),
        "mid_width": size("conv2d_5/kernel", 0),
        "dense": size("dense/kernel", 1),
    }


def _converted(
    variables: Mapping[str, np.ndarray], wanted: Mapping[str, Any], name: str, where: str
) -> dict[str, Any]:
    """Returns the checkpoint's variables as the network's tree of checked shapes."""
    leaf_names = {
        "params": {"kernel": "kernel", "bias": "bias"},
        "norm": {"scale": "gamma", "bias": "beta"},
        "batch_stats": {"mean": "moving_mean", "var": "moving_variance"},
    }
    originals = _layers(name)
    used: set[str] = set()

    def convert(path: tuple[Any, ...], expected: jax.ShapeDtypeStruct) -> np.ndarray:
        collection, layer, leaf = (key.key for key in path)
        table = "norm" if collection == "params" and layer.endswith("_norm") else collection
        variable = f"{originals[layer]}/{leaf_names[table][leaf]}"
        if variable not in variables:
            raise UserError(f"{where}: the variable {variable!r} is missing. {_HINT}")
        used.add(variable)
        value = variables[variable]
        # The original's convolutions over time are 2-D over an image of height 1.
        if leaf == "kernel" and value.ndim == len(expected.shape) + 1 and value.shape[2] == 1:
            value = value[:, :, 0]
        if value.shape != expected.shape:
            raise UserError(
                f"{where}: the variable {variable!r} has the shape {list(value.shape)} where this "
                f"network has {list(expected.shape)}. {_HINT}"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{where}: the variable {variable!r} holds non-finite values. {_HINT}")
        return value.astype(np.float32)

    tree: dict[str, Any] = jax.tree_util.tree_map_with_path(convert, dict(wanted))
    if rest := sorted(set(variables) - used - {"global_step"}):
        raise UserError(f"{where}: this network has no variable {rest[0]!r}. {_HINT}")
    return tree
