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
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from musicgenre import models
from musicgenre.audio.features import FeatureSpec
from musicgenre.audio.layout import ClipLayout
from musicgenre.config import base_config
from musicgenre.errors import UserError, did_you_mean
from musicgenre.exchange.tf_checkpoint import read_checkpoint
from musicgenre.runs.bundle import SUFFIX, save_bundle
from musicgenre.runs.model import TrainedModel

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
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    RuntimeError,
    NotImplementedError,
    EOFError,
    ValueError,
)


class Source:
    """The files of the Python package `musicnn`, in a wheel or in a folder.

    Attributes:
      path: the wheel or the package's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Finds the package: a wheel, the package's folder, or a folder that holds either.

        Raises:
          UserError: there is no such package.
        """
        self.path = Path(path)
        self._members: list[str] | None = None
        if self.path.is_dir():
            for folder in (self.path, self.path / "musicnn"):
                if (folder / "configuration.py").is_file():
                    self.path = folder
                    return
            wheels = sorted(self.path.glob("musicnn-*.whl"))
            if len(wheels) != 1:
                nothing = "neither musicnn/configuration.py nor a wheel musicnn-*.whl"
                found = f"{len(wheels)} wheels" if wheels else nothing
                raise UserError(
                    f"{self.path}: holds {found}. Name the wheel or the unpacked package. {_HINT}"
                )
            self.path = wheels[0]
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file or folder. {_HINT}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = archive.namelist()
        except _ZIP_ERRORS as error:
            raise UserError(f"{self.path}: not a wheel ({error}). {_HINT}") from error
        if "musicnn/configuration.py" not in self._members:
            raise UserError(
                f"{self.path}: not the wheel of musicnn: it holds no musicnn/configuration.py. "
                f"{_HINT}"
            )
        if len(set(self._members)) < len(self._members):
            raise UserError(f"{self.path}: two of its members have the same name. {_HINT}")

    def has(self, name: str) -> bool:
        """Returns whether the package has a file, by its name relative to the package."""
        if self._members is None:
            return (self.path / name).is_file()
        return f"musicnn/{name}" in self._members

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file, by its name relative to the package.

        Raises:
          UserError: it is missing, damaged or far too large.
        """
        if self._members is not None:
            return self._member(f"musicnn/{name}")
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path}: no such file. {_HINT}")
        _check_size(str(path), path.stat().st_size)
        return path.read_bytes()

    def notice(self) -> str:
        """Returns the licence's text, or the copyright line if it is not among the files."""
        if self._members is not None:
            for member in self._members:
                if member.startswith("musicnn-") and Path(member).name.startswith("LICENSE"):
                    return self._member(member).decode("utf-8", "replace").strip()
            return _COPYRIGHT
        nearby = self.path.parent.glob("musicnn-*.dist-info/LICENSE*")
        for path in (*self.path.glob("LICENSE*"), *nearby):
            return path.read_text(encoding="utf-8", errors="replace").strip()
        return _COPYRIGHT

    def _member(self, member: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(member)
                _check_size(f"{self.path}: {member}", info.file_size)
                return archive.read(info)  # never more than the size that it states
        except KeyError:
            raise UserError(f"{self.path}: holds no {member}. {_HINT}") from None
        except _ZIP_ERRORS as error:
            raise UserError(f"{self.path}: {member} cannot be read ({error}). {_HINT}") from error


def _check_size(where: str, size: int) -> None:
    if size > _LARGEST:
        raise UserError(f"{where}: {size} bytes are too many for a file of musicnn. {_HINT}")


def available(source: Source) -> list[str]:
    """Returns the names of the models in a package, in the order of `MODELS`.

    Raises:
      UserError: there is none.
    """
    found = [name for name in MODELS if source.has(f"{name}/.index")]
    if not found:
        raise UserError(f"{source.path}: holds none of the models {', '.join(MODELS)}. {_HINT}")
    return found


def read_model(source: Source, name: str) -> TrainedModel:
    """Reads one of musicnn's models.

    Args:
      source: the package.
      name: one of `MODELS`.

    Returns:
      The model. Its card states origin, training data, published results and licence.

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
    module = models.build(
        fields, num_classes=len(labels), frames=frames, bands=spec.bands, kind=spec.kind
    )
    x = jax.ShapeDtypeStruct((1, frames, spec.bands), jnp.float32)
    wanted = dict(jax.eval_shape(lambda key, x: module.init(key, x), jax.random.key(0), x))
    wanted.pop("intermediates", None)

    config = base_config()
    config.data.dataset = dataset
    config.data.frames = frames
    config.data.normalise = "none"
    config.features = ConfigDict(spec.to_dict())
    config.model = ConfigDict(models.resolve(fields))
    mean, std = np.zeros((1, spec.bands), np.float32), np.ones((1, spec.bands), np.float32)
    model = TrainedModel(
        workdir=source.path,
        step=0,
        which="last",
        measure=("", None),
        config=config,
        module=module,
        model={
            "variables": _converted(variables, wanted, name, where),
            "norm": {"mean": mean, "std": std},
        },
        label_names=tuple(labels),
        task="multi_label",
        features=spec,
        layout=ClipLayout(frames),
        dataset={"name": dataset, "protocol": split, "task": "multi_label", "synthetic": False},
    )
    return dataclasses.replace(model, card=_card(source, name, model, corpus))


def import_models(
    source: Source, names: Iterable[str], out: str | os.PathLike[str]
) -> Iterator[Path]:
    """Writes models as bundles and yields the path `<out>/<name>.safetensors` of each.

    Raises:
      UserError: see `read_model`; or a file cannot be written.
    """
    for name in names:
        path = Path(out) / f"{name}{SUFFIX}"
        save_bundle(read_model(source, name), path)
        yield path


def _card(source: Source, name: str, model: TrainedModel, corpus: str) -> str:
    """Returns the model's card, in Markdown."""
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
    try:
        tree = ast.parse(source.read("configuration.py"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is not Python ({error}). {_HINT}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with contextlib.suppress(
                ValueError, TypeError, SyntaxError, RecursionError, MemoryError
            ):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    for name in ("SR", "FFT_HOP", "FFT_SIZE", "N_MELS"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise UserError(
                f"{where}: {name} must be a positive number, not {found.get(name)!r}. {_HINT}"
            )
    for name in ("MTT_LABELS", "MSD_LABELS"):
        labels = found.get(name)
        if not (
            isinstance(labels, list)
            and labels
            and all(isinstance(label, str) and label for label in labels)
        ):
            raise UserError(f"{where}: {name} must be a list of labels. {_HINT}")
        if len(set(labels)) < len(labels):
            raise UserError(f"{where}: {name} holds a label twice. {_HINT}")
    return found


def _frames(source: Source, name: str) -> int:
    """Returns the frames of one input, from `config.json`."""
    where = f"{source.path}: {name}/config.json"
    try:
        config = json.loads(source.read(f"{name}/config.json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}). {_HINT}") from error
    config = config if isinstance(config, dict) else {}
    frames = config.get("n_frames")
    if type(frames) is not int or frames < 1:
        raise UserError(f"{where}: n_frames must be a positive number, not {frames!r}. {_HINT}")
    if (processing := config.get("pre_processing")) != "logC":
        raise UserError(f"{where}: pre_processing must be 'logC', not {processing!r}. {_HINT}")
    return frames


def _reported(source: Source, name: str) -> str:
    """Returns the published test results: ROC-AUC and PR-AUC, means over the tags."""
    values = []
    if source.has(f"{name}/experiment.result"):
        text = source.read(f"{name}/experiment.result").decode("utf-8", "replace")
        for line in text.splitlines():
            label, _, value = line.partition(":")
            if label.strip().endswith("AUC"):
                with contextlib.suppress(ValueError):
                    values.append(float(value))
    if len(values) != 2:
        return "not stated"
    return f"ROC-AUC {values[0]:.4f}, PR-AUC {values[1]:.4f} on the test split"


def _layers(name: str) -> dict[str, str]:
    """Returns the original's name of every layer with weights, by its name here."""
    if name.endswith("vgg"):
        convolutions, dense = [f"conv{i}" for i in range(1, 6)], ["head"]
        originals = [f"{i}CNN" for i in range(1, 6)]
        norms = ["input", *convolutions]
    else:
        convolutions = ["timbral1", "timbral2", "temporal1", "temporal2", "temporal3"]
        convolutions += ["mid1", "mid2", "mid3"]
        dense = ["dense1", "head"]
        originals = [_numbered("conv2d", i) for i in range(len(convolutions))]
        norms = ["input", *convolutions, "pool", "dense1"]
    return {
        **dict(zip(convolutions, originals, strict=True)),
        **{layer: _numbered("dense", i) for i, layer in enumerate(dense)},
        **{f"{layer}_norm": _numbered("batch_normalization", i) for i, layer in enumerate(norms)},
    }


def _numbered(layer_type: str, i: int) -> str:
    return f"{layer_type}_{i}" if i else layer_type


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
