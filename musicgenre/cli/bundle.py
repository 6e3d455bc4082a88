"""Write a trained model to one file, with a model card and without pickle.

musicgenre bundle runs/mine mine.safetensors --half
musicgenre bundle runs/mine mine.safetensors --temperature=runs/mine/evaluation-valid/metrics.json
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from musicgenre.cli.files import define_checkpoint, named
from musicgenre.errors import UserError

if TYPE_CHECKING:
    from musicgenre.runs.model import TrainedModel

FLAGS = flags.FlagValues()
ARGUMENTS = "model, out: a run's folder or another bundle, and the file to write, .safetensors"
define_checkpoint(FLAGS)
flags.DEFINE_bool("half", False, "Store numbers in float16: half the size.", FLAGS)
flags.DEFINE_string(
    "temperature",
    "",
    "Calibrates the probabilities: a number that divides the logits, or the metrics.json of an "
    "evaluation of this model with --temperature.",
    FLAGS,
)
flags.DEFINE_string("remarks", "", "A text file that is added to the card.", FLAGS)


def main(words: list[str]) -> None:
    """Writes the file and prints its card."""
    source, out = named(words, "model", "out")

    from musicgenre.runs.bundle import model_card, save_bundle
    from musicgenre.runs.model import load_model

    remarks = ""
    if FLAGS.remarks:
        try:
            remarks = Path(FLAGS.remarks).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{FLAGS.remarks}: not a readable text file ({error}).") from error
    model = load_model(source, FLAGS.checkpoint)
    if FLAGS.temperature:
        temperature, origin = _temperature(FLAGS.temperature, model)
        model = dataclasses.replace(model, temperature=temperature)
        remarks = "\n\n".join(filter(None, (remarks.strip(), origin)))
    card = model_card(model, remarks)
    save_bundle(model, out, card, half=FLAGS.half)
    print(card)
    print(f"{out}: {Path(out).stat().st_size / 2**20:.2f} MiB")


def _temperature(value: str, model: "TrainedModel") -> tuple[float, str]:
    """Returns the temperature, and a sentence on its origin ("" for a number)."""
    from musicgenre.evaluation.report import calibration_line
    from musicgenre.files import read_json

    try:
        return float(value), ""
    except ValueError:
        metrics = read_json(value, "number or metrics.json with a temperature")
    if not isinstance(metrics, dict) or not metrics.get("calibration"):
        remedy = "Fit one: musicgenre evaluate --temperature=valid ..."
        raise UserError(f"{value}: holds no temperature. {remedy}")
    config = metrics.get("config", {})
    evaluated = (config.get("seed"), metrics["checkpoint"]["step"])
    if "models" in config or evaluated != (model.config.seed, model.step):
        other = f"another model, or of another checkpoint than step {model.step}"
        raise UserError(f"{value}: is the evaluation of {other}.")
    temperature = float(metrics["calibration"]["temperature"])
    return temperature, f"Calibration: {calibration_line(metrics)}."
