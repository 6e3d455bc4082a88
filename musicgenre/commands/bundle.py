"""Write a trained model to one file, with a model card: no pickle, all that is needed to use it.

musicgenre bundle runs/mine mine.safetensors --half
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="a run's folder, or another bundle")
    parser.add_argument("out", help="the file, named .safetensors")
    parser.add_argument("--checkpoint", default="last", help="last, best or a step (default: %(default)s)")
    parser.add_argument("--half", action="store_true", help="store numbers in float16: half the size")
    parser.add_argument("--remarks", default="", help="a text file that is added to the card: results, limits, licence")


def run(arguments: argparse.Namespace) -> int:
    """Writes the file and prints its card."""
    from musicgenre.errors import UserError
    from musicgenre.inference.bundle import model_card, save_bundle
    from musicgenre.inference.model import load_model

    remarks = ""
    if arguments.remarks:
        try:
            remarks = Path(arguments.remarks).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{arguments.remarks}: not a readable text file ({error}).") from error
    model = load_model(arguments.model, arguments.checkpoint)
    card = model_card(model, remarks)
    save_bundle(model, arguments.out, card, half=arguments.half)
    print(card)
    print(f"{arguments.out}: {Path(arguments.out).stat().st_size / 2**20:.2f} MiB")
    return 0
