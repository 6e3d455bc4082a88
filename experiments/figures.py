r"""Draws the figures of a data set, a sound file, a network or a trained run as PNG files and prints where they are.

python experiments/figures.py --workdir=runs/conv1d --split=test
python experiments/figures.py --config=configs/gtzan_conv1d.py --config.data.root=/data/gtzan
python experiments/figures.py --clip=song.mp3 --tags=/data/mtat/annotations_final.csv
python experiments/figures.py --model=conv1d --frames=647 --bands=128
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from musicgenre import config, models
from musicgenre.audio.features import FeatureSpec
from musicgenre.cli import app
from musicgenre.datasets import load_dataset
from musicgenre.errors import UserError
from musicgenre.models.describe import table
from musicgenre.runs.model import load_model
from musicgenre.store.store import Store
from musicgenre.studies.evaluate import training_store
from musicgenre.studies.figures import (
    architecture_figure,
    label_figures,
    run_figures,
    sound_figures,
    table_figures,
)

_OUT = flags.DEFINE_string(
    "out", "", "Folder of the pictures; <workdir>/figures or else runs/figures if empty."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "A trained run: curves, mistakes, network, labels and one clip."
)
_SPLIT = flags.DEFINE_enum(
    "split", "valid", ["train", "valid", "test"], "With --workdir: the split that is evaluated."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "With --workdir: last, best or a step.")
_STORE = flags.DEFINE_string(
    "store", "", "With --workdir: the store; the one that it was trained on if empty."
)
_CLIP_ID = flags.DEFINE_string(
    "clip_id", "", "With --workdir: the clip that is drawn; the first of the split if empty."
)
_CLIP = flags.DEFINE_string(
    "clip",
    "",
    "A sound file: its spectrogram by the run's or the config's front end, or the report's.",
)
_TAGS = flags.DEFINE_string(
    "tags", "", "MagnaTagATune's table annotations_final.csv or .csv.gz: clips of each tag."
)
_TOP = flags.DEFINE_integer(
    "top", 50, "How many of the most frequent tags are drawn apart.", lower_bound=1
)
_MODEL = flags.DEFINE_string(
    "model", "", "A registered network with its own defaults: its layers. Others: --config."
)
_FRAMES = flags.DEFINE_integer("frames", 647, "With --model: frames of its input.", lower_bound=1)
_BANDS = flags.DEFINE_integer("bands", 128, "With --model: bands of its input.", lower_bound=1)
_CLASSES = flags.DEFINE_integer(
    "classes", 10, "Outputs of a network whose labels are not known.", lower_bound=1
)


def main() -> int:
    """Draws what the flags name and prints the paths."""
    settings = app.get_config() if flags.FLAGS.config is not None else None
    if not (_WORKDIR.value or settings or _CLIP.value or _TAGS.value or _MODEL.value):
        raise UserError(
            "nothing to draw: give --workdir, --config, --clip, --tags or --model (see --help)."
        )
    if _WORKDIR.value and settings:
        raise UserError("--workdir brings its own config: give only one of --workdir and --config.")
    out = Path(_OUT.value or (f"{_WORKDIR.value}/figures" if _WORKDIR.value else "runs/figures"))
    features = config.feature_spec(settings) if settings else FeatureSpec()
    if _WORKDIR.value:
        model = load_model(_WORKDIR.value, _CHECKPOINT.value)
        features = model.features
        store = Store.open(_STORE.value or training_store(model.workdir))
        _print(run_figures(model, store, out, _SPLIT.value, clip_id=_CLIP_ID.value, top=_TOP.value))
    if _CLIP.value:
        _print(sound_figures(_CLIP.value, features, out))
    elif settings:
        _draw_config(settings, out)
    if _TAGS.value:
        _print(table_figures(_TAGS.value, out, _TOP.value))
    if _MODEL.value:
        _draw_network({"name": _MODEL.value}, out, _CLASSES.value, _FRAMES.value, _BANDS.value)
    return 0


def _draw_config(settings: ConfigDict, out: Path) -> None:
    """Draws the labels of a config's data set, where it says which, and its network."""
    place = config.store_path(settings)
    classes = _CLASSES.value
    if (
        (place / "manifest.json").is_file()
        or settings.data.root
        or settings.data.dataset == "arrays"
    ):
        clips = (
            Store.open(place)
            if (place / "manifest.json").is_file()
            else load_dataset(config.dataset_options(settings))
        )
        classes = len(clips.label_names)
        _print(label_figures(clips, out, _TOP.value))
    else:
        print("no labels are drawn: the config names no data.root and its store is not there.")
    frames = settings.data.crop_frames or settings.data.frames
    spec = config.feature_spec(settings)
    _draw_network(settings.model.to_dict(), out, classes, frames, spec.bands, spec.kind)


def _draw_network(
    fields: dict[str, object], out: Path, classes: int, frames: int, bands: int, kind: str = ""
) -> None:
    name = str(models.resolve(fields)["name"])
    module = models.build(fields, num_classes=classes, frames=frames, bands=bands, kind=kind)
    path, layers = architecture_figure(module, frames, bands, out, name, f"{classes} outputs")
    print(table(layers))
    _print([path])


def _print(paths: list[Path]) -> None:
    for path in paths:
        print(path)


if __name__ == "__main__":
    app.define_config_flag()
    app.run(main)
