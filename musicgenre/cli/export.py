"""Write a model as one ONNX or StableHLO program from sound to probabilities.

musicgenre export gtzan --out=gtzan.onnx
musicgenre export runs/mine --checkpoint=best --out=mine.stablehlo

The program includes the front end: it takes mono samples at the model's rate, float32
[batch, samples], and returns probabilities [batch, classes]. <out>.json holds the labels, the rate,
the number of samples and the model's card. The program is run and compared with the model before
it is renamed to <out>. Needs: pip install 'musicgenre[export]'.
"""

from absl import flags

from musicgenre.cli.files import define_checkpoint, named, warn_if_synthetic

FLAGS = flags.FlagValues()
ARGUMENTS = "model: a packaged model's name, a run's folder or a bundle"
define_checkpoint(FLAGS)
flags.DEFINE_string("out", None, "The file to write.", FLAGS, required=True)
flags.DEFINE_enum(
    "format", None, ["onnx", "stablehlo"], "By default from the file's ending.", FLAGS
)
flags.DEFINE_float("seconds", 0.0, "Length of an input; 0 is the model's clip.", flag_values=FLAGS)


def main(words: list[str]) -> None:
    """Exports the model and prints what was written."""
    (source,) = named(words, "model")

    from musicgenre.exchange.export import check_format, export_model
    from musicgenre.runs.model import load_model

    form = check_format(FLAGS.out, FLAGS.format or "")
    model = load_model(source, FLAGS.checkpoint)
    exported = export_model(model, FLAGS.out, form, seconds=FLAGS.seconds)
    rate = model.features.sample_rate
    print(
        f"{exported.path}: {exported.path.stat().st_size / 1e6:.1f} MB; "
        f"samples [batch, {exported.samples}] ({exported.samples / rate:.2f} s, mono, {rate} Hz) "
        f"-> probabilities [batch, {len(model.label_names)}]"
    )
    print(f"checked: at most {exported.difference:.1e} from the model's own probabilities")
    print(f"{exported.notes}: labels and notes")
    warn_if_synthetic(model)
