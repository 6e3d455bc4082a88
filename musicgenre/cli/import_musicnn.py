"""Convert musicnn's published weights: 50 tags of MagnaTagATune, 50 of the Million Song Dataset.

pip download --no-deps musicnn==0.1.0
musicgenre import-musicnn musicnn-0.1.0-py3-none-any.whl --out=models
musicgenre tag song.mp3 --model=models/MTT_musicnn.safetensors
"""

from absl import flags

from musicgenre.cli.files import named

FLAGS = flags.FlagValues()
ARGUMENTS = "source: the wheel of musicnn, its unpacked package, or a folder that holds either"
REPEATED = ("models",)
flags.DEFINE_string("out", ".", "Folder of the files <name>.safetensors.", FLAGS)
flags.DEFINE_multi_string(
    "models", [], "MTT_musicnn, MSD_musicnn, MTT_vgg, MSD_vgg; all if empty.", FLAGS
)


def main(words: list[str]) -> None:
    """Writes a file for each model and prints its size."""
    (name,) = named(words, "source")

    from musicgenre.exchange.musicnn import MODELS, Source, available, import_models

    source = Source(name)
    found = available(source)
    for path in import_models(source, FLAGS.models or found, FLAGS.out):
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB", flush=True)
    if not FLAGS.models:
        # The wheel never held the largest model.
        for missing in [model for model in MODELS[:4] if model not in found]:
            print(f"{source.path}: holds no {missing}.")
