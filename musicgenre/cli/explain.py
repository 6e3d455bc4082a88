"""Explain predictions: filters, activations, evidence for a label, a unit's strongest moments.

musicgenre explain song.mp3 --out=explained                  # then open explained/index.html
musicgenre explain song.mp3 --label=jazz --at=95             # for jazz, around second 95
musicgenre explain song.mp3 --layer=last_norm --unit=3 --clips music/ --cut    # a unit's moments
musicgenre explain --list_layers --model=runs/mine

Writes `<out>/index.html` (the network and the strongest moments, also in `moments.csv`), and per
file a folder with a page, pictures, sounds, `activations.npz` (the values of every layer) and
`saliency.npz`.
"""

import dataclasses

from absl import flags

from musicgenre.cli.files import FILES, Tally, define_model, expand, load_tagger
from musicgenre.errors import UserError

FLAGS = flags.FlagValues()
ARGUMENTS = FILES
REPEATED = ("clips",)
define_model(FLAGS)
flags.DEFINE_string("out", "explained", "Folder to write to.", FLAGS)
flags.DEFINE_string(
    "label", "", "Label to explain; the most probable of each file if empty.", FLAGS
)
flags.DEFINE_float(
    "at",
    None,
    "Explain the window around these seconds (default: where the label is most probable).",
    flag_values=FLAGS,
)
flags.DEFINE_string("layer", "", "Layer of --unit; without --unit, the layer of Grad-CAM.", FLAGS)
flags.DEFINE_integer("unit", None, "Unit of --layer to explain.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "clips", [], "Where to search for moments; the explained files if empty.", FLAGS
)
flags.DEFINE_integer("top", 5, "Moments per unit.", 1, flag_values=FLAGS)
flags.DEFINE_bool("cut", False, "Cut the moments out as WAV files.", FLAGS)
flags.DEFINE_float("seconds", 3.0, "Length of a cut moment.", flag_values=FLAGS)
flags.DEFINE_list("parts", "filters,activations,saliency,sound,moments", "Any of these.", FLAGS)
flags.DEFINE_bool("list_layers", False, "Print layers and units, then exit.", FLAGS)


def main(words: list[str]) -> int:
    """Explains every file; returns 3 if some failed, 2 if all did."""
    from musicgenre.explain.page import Explanation, Options, UnusableFile, layer_table
    from musicgenre.explain.taps import Explainer

    names = (field.name for field in dataclasses.fields(Options))
    options = Options(**{name: FLAGS[name].value for name in names})
    if FLAGS.list_layers:
        print(layer_table(Explainer(load_tagger(FLAGS).model)))
        return 0
    if not words:
        raise UserError("no files: name sound files or folders, or give --list_layers.")
    tally = Tally()
    files = expand(words, tally)
    if not files:
        return tally.exit_code()
    clips = expand(FLAGS.clips, tally) if FLAGS.clips else None
    explanation = Explanation(load_tagger(FLAGS), options, FLAGS.model)
    for path in files:
        try:
            line = explanation.add(path)
        except UnusableFile as error:
            tally.fail(str(error))
        else:
            tally.done += 1
            print(line, flush=True)
    if tally.done:
        for line in explanation.finish(clips, tally.fail):
            print(line)
    return tally.exit_code()
