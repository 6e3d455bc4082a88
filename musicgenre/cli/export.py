"""Write a model as one program from sound to probabilities, for use without this package: ONNX or StableHLO.

musicgenre export gtzan --out=gtzan.onnx
musicgenre export runs/mine --checkpoint=best --out=mine.stablehlo

The program takes mono samples at the model's rate, float32 [batch, samples], and returns probabilities [batch, classes]; the
front end is inside. Beside it lies <out>.json with the labels, the rate, the number of samples and the model's card. What was
written is run and compared with the model before it takes its name. Needs: pip install 'musicgenre[export]'.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "model", help="a model of this package, a run's folder, or a .safetensors file"
    )
    parser.add_argument("--out", required=True, help="the file, .onnx or .stablehlo")
    parser.add_argument(
        "--format", choices=["onnx", "stablehlo"], default="", help="default: by the file's ending"
    )
    parser.add_argument(
        "--checkpoint", default="last", help="of a run: last, best or a step (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="length of an input, at most the model's clip (default: the clip)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Exports the model and says what was written."""
    from musicgenre.exchange.export import check_format, export_model
    from musicgenre.runs.model import load_model

    form = check_format(arguments.out, arguments.format)
    model = load_model(arguments.model, arguments.checkpoint)
    exported = export_model(model, arguments.out, form, seconds=arguments.seconds)
    rate = model.features.sample_rate
    print(
        f"{exported.path}: {exported.path.stat().st_size / 1e6:.1f} MB; samples [batch, {exported.samples}] "
        f"({exported.samples / rate:.2f} s, mono, {rate} Hz) -> probabilities [batch, {len(model.label_names)}]"
    )
    print(f"checked: at most {exported.difference:.1e} from the model's own probabilities")
    print(f"{exported.notes}: labels and notes")
    if model.dataset.get("synthetic"):
        print(
            "SYNTHETIC: this model was trained on made-up audio; its labels mean nothing for real music.",
            file=sys.stderr,
        )
    return 0
