"""Explain predictions: filters, activations, evidence for a label, and a unit's strongest moments.

musicgenre explain song.mp3 --out=explained                   # then open explained/index.html
musicgenre explain song.mp3 --label=jazz --at=95              # for jazz, around second 95
musicgenre explain song.mp3 --layer=last_norm --unit=3 --clips music/ --cut    # a unit's moments
musicgenre explain --list_layers --model=runs/mine

Writes `<out>/index.html` (the network and the strongest moments, also in `moments.csv`), and per
file a folder with a page, pictures, sounds, `activations.npz` (the values of every layer) and
`saliency.npz`.
"""

import argparse

from musicgenre.cli.files import Tally, add_model, expand, load_tagger

_PARTS = "filters,activations,saliency,sound,moments"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        help="sound files, folders (all sound files below), patterns such as 'music/*.mp3', or - "
        "for a list on stdin",
    )
    add(
        "--min_seconds",
        type=float,
        default=1.0,
        help="shorter files are refused (default: %(default)s)",
    )
    add_model(parser)
    add("--out", default="explained", help="folder to write (default: %(default)s)")
    add("--label", default="", help="label to explain (default: the most probable of each file)")
    add(
        "--at",
        type=float,
        help="explain the window around these seconds (default: where the label is most probable)",
    )
    add("--layer", default="", help="layer of --unit; without --unit, the layer of Grad-CAM")
    add("--unit", type=int, help="unit of --layer to explain as well")
    add(
        "--clips",
        nargs="+",
        default=[],
        help="files and folders to search for moments (default: the files)",
    )
    add("--top", type=int, default=5, help="moments per unit (default: %(default)s)")
    add("--cut", action="store_true", help="cut the moments out as WAV files")
    add(
        "--seconds",
        type=float,
        default=3.0,
        help="length of a cut moment in seconds (default: %(default)s)",
    )
    add("--parts", default=_PARTS, help="any of %(default)s")
    add("--list_layers", action="store_true", help="print the layers and their units, then exit")


def run(arguments: argparse.Namespace) -> int:
    """Explains every file; returns 3 if some failed, 2 if all did."""
    from musicgenre.errors import UserError
    from musicgenre.explain.page import Explanation, Options, UnusableFile, layer_table
    from musicgenre.explain.taps import Explainer

    options = Options(
        out=arguments.out,
        label=arguments.label,
        at=arguments.at,
        layer=arguments.layer,
        unit=arguments.unit,
        top=arguments.top,
        cut=arguments.cut,
        seconds=arguments.seconds,
        parts=arguments.parts.split(","),
    )
    if arguments.list_layers:
        print(layer_table(Explainer(load_tagger(arguments).model)))
        return 0
    if not arguments.files:
        raise UserError("name at least one sound file or folder, or pass --list_layers.")
    tally = Tally()
    files = expand(arguments.files, tally)
    if not files:
        return tally.exit_code()
    clips = expand(arguments.clips, tally) if arguments.clips else None
    explanation = Explanation(load_tagger(arguments), options, arguments.model)
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
