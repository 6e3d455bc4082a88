r"""Draw figures of a data set, a sound file, a network or a trained run as PNG files.

musicgenre figures --workdir=runs/conv1d --split=test
musicgenre figures --config=gtzan_conv1d --config.data.root=/data/gtzan
musicgenre figures --clip=song.mp3 --tags=/data/mtat/annotations_final.csv
musicgenre figures --model=conv1d --frames=647 --bands=128
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from musicgenre.cli import app
from musicgenre.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FLAGS = flags.FlagValues()
app.define_config(FLAGS)
flags.DEFINE_string("out", "", "Folder; <workdir>/figures or runs/figures if empty.", FLAGS)
flags.DEFINE_string(
    "workdir", "", "A trained run: curves, mistakes, network, labels, a clip.", FLAGS
)
flags.DEFINE_enum(
    "split", "valid", ["train", "valid", "test"], "With --workdir: the evaluated split.", FLAGS
)
flags.DEFINE_string("checkpoint", "last", "With --workdir: last, best or a step.", FLAGS)
flags.DEFINE_string("store", "", "With --workdir: the store; the run's own if empty.", FLAGS)
flags.DEFINE_string("clip_id", "", "With --workdir: the clip; the split's first if empty.", FLAGS)
flags.DEFINE_string("clip", "", "A sound file: its spectrogram, by the run or config.", FLAGS)
flags.DEFINE_string(
    "tags", "", "MagnaTagATune's annotations_final.csv or .csv.gz: clips per tag.", FLAGS
)
flags.DEFINE_integer("top", 50, "Number of most frequent tags to draw.", 1, flag_values=FLAGS)
flags.DEFINE_string("model", "", "A registered network with its defaults: its layers.", FLAGS)
flags.DEFINE_integer("frames", 647, "With --model: frames of its input.", 1, flag_values=FLAGS)
flags.DEFINE_integer("bands", 128, "With --model: bands of its input.", 1, flag_values=FLAGS)
flags.DEFINE_integer("classes", 10, "Outputs of a network without labels.", 1, flag_values=FLAGS)


def main() -> None:
    """Draws what the flags name and prints the paths."""
    settings = app.get_config(FLAGS) if FLAGS.config is not None else None
    workdir = FLAGS.workdir
    if not (workdir or settings or FLAGS.clip or FLAGS.tags or FLAGS.model):
        raise UserError("nothing to draw: give --workdir, --config, --clip, --tags or --model.")
    if workdir and settings:
        raise UserError("--workdir brings its own config: give only one of the two.")

    from musicgenre.audio.features import FeatureSpec
    from musicgenre.config import feature_spec
    from musicgenre.runs.model import load_model
    from musicgenre.store.store import Store
    from musicgenre.studies.evaluate import training_store
    from musicgenre.studies.figures import run_figures, sound_figures, table_figures

    out = Path(FLAGS.out or (f"{workdir}/figures" if workdir else "runs/figures"))
    features = feature_spec(settings) if settings else FeatureSpec()
    if workdir:
        model = load_model(workdir, FLAGS.checkpoint)
        features = model.features
        store = Store.open(FLAGS.store or training_store(model.workdir))
        _print(run_figures(model, store, out, FLAGS.split, clip_id=FLAGS.clip_id, top=FLAGS.top))
    if FLAGS.clip:
        _print(sound_figures(FLAGS.clip, features, out))
    elif settings:
        _draw_config(settings, out)
    if FLAGS.tags:
        _print(table_figures(FLAGS.tags, out, FLAGS.top))
    if FLAGS.model:
        inputs = {"frames": FLAGS.frames, "bands": FLAGS.bands}
        _draw_network({"name": FLAGS.model}, out, FLAGS.classes, **inputs)


def _draw_config(settings: "ConfigDict", out: Path) -> None:
    """Draws the network of a config, and the labels of its data set if it is available."""
    from musicgenre import config
    from musicgenre.datasets import load_dataset
    from musicgenre.store.store import Store
    from musicgenre.studies.figures import label_figures

    path = config.store_path(settings)
    prepared = (path / "manifest.json").is_file()
    classes = FLAGS.classes
    if prepared or settings.data.root or settings.data.dataset == "arrays":
        clips = Store.open(path) if prepared else load_dataset(config.dataset_options(settings))
        classes = len(clips.label_names)
        _print(label_figures(clips, out, FLAGS.top))
    else:
        print("no labels are drawn: the config has no data.root, and no store is prepared.")
    spec = config.feature_spec(settings)
    inputs = {"frames": settings.data.crop_frames or settings.data.frames, "bands": spec.bands}
    _draw_network(settings.model.to_dict(), out, classes, **inputs, kind=spec.kind)


def _draw_network(fields: dict[str, object], out: Path, classes: int, **inputs: Any) -> None:
    """Draws a network's layers and prints them as a table."""
    from musicgenre import models
    from musicgenre.models.describe import table
    from musicgenre.studies.architecture import architecture_figure

    name = str(models.resolve(fields)["name"])
    module = models.build(fields, num_classes=classes, **inputs)
    sizes = (inputs["frames"], inputs["bands"])
    path, layers = architecture_figure(module, *sizes, out, name, f"{classes} outputs")
    print(table(layers))
    _print([path])


def _print(paths: Iterable[Path]) -> None:
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    app.run(__name__)
