"""musicnn's published weights (Pons and Serra 2019): out of the public wheel's TensorFlow checkpoints, without TensorFlow.

The wheel `musicnn` 0.1.0 holds four models: MTT_musicnn and MTT_vgg know 50 tags of MagnaTagATune, MSD_musicnn and MSD_vgg 50
of the Million Song Dataset. What else is needed lies beside the weights: the labels in the order of the outputs and the front end
in `configuration.py`, which is parsed and never run, and the frames of an input in `config.json`. Nothing is unpacked: members
of a wheel are read into memory by their names.

Source: J. Pons, X. Serra, "musicnn: pre-trained convolutional neural networks for music audio tagging", arXiv:1909.06654. The
weights are Universitat Pompeu Fabra's, under the ISC licence, whose notice goes into each model's card.
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
from musicgenre.runs.model import TrainedModel

# The last one comes with the source code only, not with the wheel.
MODELS = ("MTT_musicnn", "MSD_musicnn", "MTT_vgg", "MSD_vgg", "MSD_musicnn_big")
_HINT = "Fetch it with: pip download --no-deps musicnn==0.1.0"
# Far more than any file of the wheel has (9.5 MB), so that a bad archive cannot fill the memory.
_LARGEST = 2**28
_COPYRIGHT = "Copyright (c) Music Technology Group, Universitat Pompeu Fabra 2019. Code developed by Jordi Pons. ISC licence."
_DATASETS = {
    "MTT": ("mtat", "MagnaTagATune", "all clips: 18,709 train, 1,825 validation, 5,329 test"),
    "MSD": ("msd", "Million Song Dataset with Last.fm tags", "the original's"),
}


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
                found = (
                    f"{len(wheels)} wheels"
                    if wheels
                    else "neither musicnn/configuration.py nor a wheel musicnn-*.whl"
                )
                raise UserError(
                    f"{self.path}: holds {found}. Name the wheel or the unpacked package. {_HINT}"
                )
            self.path = wheels[0]
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file or folder. {_HINT}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{self.path}: not a wheel ({error}). {_HINT}") from error
        if "musicnn/configuration.py" not in self._members:
            raise UserError(
                f"{self.path}: not the wheel of musicnn: it holds no musicnn/configuration.py. {_HINT}"
            )
        if len(set(self._members)) < len(self._members):
            raise UserError(f"{self.path}: two of its members have the same name. {_HINT}")

    def has(self, name: str) -> bool:
        """Says whether there is a file of that name, relative to the package."""
        return (
            f"musicnn/{name}" in self._members
            if self._members is not None
            else (self.path / name).is_file()
        )

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
        if path.stat().st_size > _LARGEST:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes are too many for a file of musicnn. {_HINT}"
            )
        return path.read_bytes()

    def notice(self) -> str:
        """Returns the licence's text, or who has the rights where it is not among the files."""
        if self._members is not None:
            for member in self._members:
                if member.startswith("musicnn-") and Path(member).name.startswith("LICENSE"):
                    return self._member(member).decode("utf-8", "replace").strip()
            return _COPYRIGHT
        for path in (
            *self.path.glob("LICENSE*"),
            *self.path.parent.glob("musicnn-*.dist-info/LICENSE*"),
        ):
            return path.read_text(encoding="utf-8", errors="replace").strip()
        return _COPYRIGHT

    def _member(self, member: str) -> bytes:
        """Returns the bytes of a member of the wheel; nothing is written, so no name can lead out of a folder."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(member)
                if info.file_size > _LARGEST:
                    raise UserError(
                        f"{self.path}: {member} claims {info.file_size} bytes, too many for a file of musicnn. {_HINT}"
                    )
                # Never more than it claims, which is what its checksum is of.
                return archive.read(info)
        except KeyError:
            raise UserError(f"{self.path}: holds no {member}. {_HINT}") from None
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            RuntimeError,
            NotImplementedError,
            EOFError,
            ValueError,
        ) as error:
            raise UserError(f"{self.path}: {member} cannot be read ({error}). {_HINT}") from error


def available(source: Source) -> list[str]:
    """Returns the names of the models that are there, in the order of `MODELS`.

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
      The model, with its card: where it comes from, what it was trained on, what it reached, its licence.

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
    model = TrainedModel(
        workdir=source.path,
        step=0,
        which="last",
        measure=("", None),
        config=config,
        module=module,
        model={
            "variables": _converted(variables, wanted, name, where),
            "norm": {
                "mean": np.zeros((1, spec.bands), np.float32),
                "std": np.ones((1, spec.bands), np.float32),
            },
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
    """Writes models as bundles, and yields the path `<out>/<name>.safetensors` of each.

    Raises:
      UserError: see `read_model`; or a file cannot be written.
    """
    from musicgenre.runs.bundle import SUFFIX, save_bundle

    for name in names:
        path = Path(out) / f"{name}{SUFFIX}"
        save_bundle(read_model(source, name), path)
        yield path


def _card(source: Source, name: str, model: TrainedModel, corpus: str) -> str:
    """Returns the model's card, in Markdown."""
    digest = hashlib.sha256(source.read(f"{name}/.data-00000-of-00001")).hexdigest()
    seconds = model.frames * model.features.hop_length / model.features.sample_rate
    return "\n".join(
        [
            f"# {name}",
            "",
            f"- Origin: {name} of musicnn 0.1.0 (J. Pons, X. Serra, arXiv:1909.06654), converted from its TensorFlow checkpoint "
            f"(SHA-256 {digest})",
            f"- Task: {model.task}, {len(model.label_names)} outputs",
            f"- Data: {corpus}; split: {model.dataset['protocol']}",
            f"- Measured, as published with the weights: {_reported(source, name)}",
            f"- Input: {seconds:.2f} s windows ({model.frames} frames x {model.features.bands} bands)",
            f"- Front end: {model.features.describe()}",
            f"- Labels in the order of the outputs: {', '.join(model.label_names)}",
            "- Limits: it knows these labels only and gives each a probability for any sound.",
            "- Licence: ISC",
            "",
            source.notice(),
            "",
        ]
    )


def _configuration(source: Source) -> dict[str, Any]:
    """Returns the literals that `configuration.py` assigns: the front end and the labels."""
    where = f"{source.path}: configuration.py"
    try:
        tree = ast.parse(source.read("configuration.py"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is not Python ({error}). {_HINT}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            try:
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    for name in ("SR", "FFT_HOP", "FFT_SIZE", "N_MELS"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise UserError(
                f"{where}: {name} must be a positive number, not {found.get(name)!r}. {_HINT}"
            )
    for name in ("MTT_LABELS", "MSD_LABELS"):
        labels = found.get(name)
        if (
            not isinstance(labels, list)
            or not labels
            or not all(isinstance(label, str) and label for label in labels)
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
    frames = config.get("n_frames") if isinstance(config, dict) else None
    if type(frames) is not int or frames < 1:
        raise UserError(f"{where}: n_frames must be a positive number, not {frames!r}. {_HINT}")
    if config.get("pre_processing") != "logC":
        raise UserError(
            f"{where}: pre_processing must be 'logC', not {config.get('pre_processing')!r}. {_HINT}"
        )
    return frames


def _reported(source: Source, name: str) -> str:
    """Returns the test results that lie beside the weights: ROC-AUC and PR-AUC, means over the tags."""
    values = []
    if source.has(f"{name}/experiment.result"):
        for line in (
            source.read(f"{name}/experiment.result").decode("utf-8", "replace").splitlines()
        ):
            label, _, value = line.partition(":")
            if label.strip().endswith("AUC"):
                with contextlib.suppress(ValueError):
                    values.append(float(value))
    return (
        f"ROC-AUC {values[0]:.4f}, PR-AUC {values[1]:.4f} on the test split"
        if len(values) == 2
        else "not stated"
    )


def _layers(name: str) -> Iterator[tuple[str, str]]:
    """Yields (name in the original, name here) of every layer with weights; see the models' docstrings."""
    if name.endswith("vgg"):
        convolutions, dense = [f"conv{i}" for i in range(1, 6)], ["head"]
        originals = [f"{i}CNN" for i in range(1, 6)]
        norms = ["input_norm", *(f"{layer}_norm" for layer in convolutions)]
    else:
        convolutions = [
            "timbral1",
            "timbral2",
            "temporal1",
            "temporal2",
            "temporal3",
            "mid1",
            "mid2",
            "mid3",
        ]
        dense = ["dense1", "head"]
        originals = [_numbered("conv2d", i) for i in range(len(convolutions))]
        norms = [
            "input_norm",
            *(f"{layer}_norm" for layer in convolutions),
            "pool_norm",
            "dense1_norm",
        ]
    yield from zip(originals, convolutions, strict=True)
    yield from ((_numbered("dense", i), layer) for i, layer in enumerate(dense))
    yield from ((_numbered("batch_normalization", i), layer) for i, layer in enumerate(norms))


def _numbered(kind: str, i: int) -> str:
    return f"{kind}_{i}" if i else kind


def _fields(variables: Mapping[str, np.ndarray], name: str, where: str) -> dict[str, Any]:
    """Returns the model section of a config: the network whose sizes the variables have."""

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
    """Returns the variables as the network's own tree, after holding each against its shape.

    Args:
      variables: of the checkpoint.
      wanted: the network's tree of shapes.
      name: of the model.
      where: for messages.

    Raises:
      UserError: a variable is missing, one too many, of another shape, or not finite.
    """
    names = {
        "params": {"kernel": "kernel", "bias": "bias"},
        "norm": {"scale": "gamma", "bias": "beta"},
        "batch_stats": {"mean": "moving_mean", "var": "moving_variance"},
    }
    originals = {ours: theirs for theirs, ours in _layers(name)}
    used: set[str] = set()

    def convert(collection: str, layer: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        kind = "norm" if collection == "params" and layer.endswith("_norm") else collection
        variable = f"{originals[layer]}/{names[kind][leaf]}"
        if variable not in variables:
            raise UserError(f"{where}: the variable {variable!r} is missing. {_HINT}")
        used.add(variable)
        value = variables[variable]
        # Convolutions over time are ones over an image of height 1 in the original.
        if leaf == "kernel" and value.ndim == len(shape) + 1 and value.shape[2] == 1:
            value = value[:, :, 0]
        if value.shape != shape:
            raise UserError(
                f"{where}: the variable {variable!r} has the shape {list(value.shape)} where this network has {list(shape)}. "
                f"{_HINT}"
            )
        if not np.isfinite(value).all():
            raise UserError(
                f"{where}: the variable {variable!r} holds values that are not finite. {_HINT}"
            )
        return value.astype(np.float32)

    tree = {
        collection: {
            layer: {
                leaf: convert(collection, layer, leaf, shape.shape)
                for leaf, shape in leaves.items()
            }
            for layer, leaves in layers.items()
        }
        for collection, layers in wanted.items()
    }
    if rest := sorted(set(variables) - used - {"global_step"}):
        raise UserError(f"{where}: the variable {rest[0]!r} has no place in this network. {_HINT}")
    return tree
