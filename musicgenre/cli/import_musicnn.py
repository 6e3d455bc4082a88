"""Make musicnn's published weights usable here: 50 tags of MagnaTagATune, 50 of the Million Song Dataset.

pip download --no-deps musicnn==0.1.0
musicgenre import-musicnn musicnn-0.1.0-py3-none-any.whl --out models
musicgenre tag song.mp3 --model models/MTT_musicnn.safetensors
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "source", help="the wheel of musicnn, its unpacked package, or a folder that holds either"
    )
    parser.add_argument(
        "--out",
        default=".",
        help="folder of the files <name>.safetensors (default: the current one)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="MTT_musicnn, MSD_musicnn, MTT_vgg, MSD_vgg (default: all that are there)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes a file for each model and says what it holds."""
    from musicgenre.exchange.musicnn import MODELS, Source, available, import_models

    source = Source(arguments.source)
    found = available(source)
    for path in import_models(source, arguments.models or found, arguments.out):
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB", flush=True)
    if not arguments.models:
        # The big one was never in the wheel.
        for name in [name for name in MODELS[:4] if name not in found]:
            print(f"{source.path}: holds no {name}.")
    return 0
