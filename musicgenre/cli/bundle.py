"""Write a trained model to one file, with a model card: no pickle, all that is needed to use it.

musicgenre bundle runs/mine mine.safetensors --half
musicgenre bundle runs/mine mine.safetensors --temperature=runs/mine/evaluation-valid/metrics.json
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musicgenre.runs.model import TrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="a run's folder, or another bundle")
    parser.add_argument("out", help="the file, named .safetensors")
    parser.add_argument(
        "--checkpoint", default="last", help="last, best or a step (default: %(default)s)"
    )
    parser.add_argument(
        "--half", action="store_true", help="store numbers in float16: half the size"
    )
    parser.add_argument(
        "--temperature",
        default="",
        help="calibrates the probabilities: a number that divides the logits, or the metrics.json of an evaluation of this model "
        "with --temperature",
    )
    parser.add_argument(
        "--remarks",
        default="",
        help="a text file that is added to the card: results, limits, licence",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the file and prints its card."""
    from musicgenre.errors import UserError
    from musicgenre.runs.bundle import model_card, save_bundle
    from musicgenre.runs.model import load_model

    remarks = ""
    if arguments.remarks:
        try:
            remarks = Path(arguments.remarks).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{arguments.remarks}: not a readable text file ({error}).") from error
    model = load_model(arguments.model, arguments.checkpoint)
    if arguments.temperature:
        temperature, told = _temperature(arguments.temperature, model)
        model = dataclasses.replace(model, temperature=temperature)
        remarks = "\n\n".join(filter(None, (remarks.strip(), told)))
    card = model_card(model, remarks)
    save_bundle(model, arguments.out, card, half=arguments.half)
    print(card)
    print(f"{arguments.out}: {Path(arguments.out).stat().st_size / 2**20:.2f} MiB")
    return 0


def _temperature(asked: str, model: "TrainedModel") -> tuple[float, str]:
    """Returns the temperature that is asked for, and a sentence on where it comes from, "" for a number."""
    from musicgenre.errors import UserError
    from musicgenre.evaluation.report import calibration_line
    from musicgenre.files import read_json

    try:
        return float(asked), ""
    except ValueError:
        metrics = read_json(asked, "number or metrics.json with a temperature")
    if not isinstance(metrics, dict) or not metrics.get("calibration"):
        raise UserError(
            f"{asked}: holds no temperature. Evaluate with it: experiments/evaluate.py --temperature=valid ..."
        )
    config = metrics.get("config", {})
    if "models" in config or (config.get("seed"), metrics["checkpoint"]["step"]) != (
        model.config.seed,
        model.step,
    ):
        raise UserError(
            f"{asked}: is the evaluation of another model, or of another checkpoint than step {model.step}."
        )
    return float(
        metrics["calibration"]["temperature"]
    ), f"Calibration: {calibration_line(metrics)}."
