"""Show and sound what a model listens to: filters, activations, what speaks for a label, the moments that excite its units.

musicgenre explain song.mp3 --out=explained                   # then open explained/index.html
musicgenre explain song.mp3 --label=jazz --at=95              # for jazz, around second 95
musicgenre explain song.mp3 --layer=last_norm --unit=3 --clips music/ --cut    # one unit, its moments in a folder, cut out
musicgenre explain --list_layers --model=runs/mine

Writes `<out>/index.html` (the network, and the strongest moments, also in `moments.csv`) and for each file a folder with a page,
pictures, sounds, `activations.npz` (the values of every layer) and `saliency.npz`.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgenre.cli.files import Tally, add_model, expand, load_tagger

if TYPE_CHECKING:
    import numpy as np

    from musicgenre.audio.features import FeatureSpec
    from musicgenre.evaluation.plots import TimePanel
    from musicgenre.explain.attribution import Attribution, Chosen, Explainer, Moment
    from musicgenre.explain.plots import Section
    from musicgenre.inference.tagger import Tagger

_PARTS = ("filters", "activations", "saliency", "sound", "moments")
# Units of the embedding of each file whose moments are sought, and of all files together.
_UNITS_OF_A_FILE, _MOST_UNITS = 3, 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "files",
        nargs="*",
        help="sound files, folders (all sound files below), patterns such as 'music/*.mp3', or - for a list on stdin",
    )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=1.0,
        help="shorter files are refused (default: %(default)s)",
    )
    add_model(parser)
    parser.add_argument(
        "--out", default="explained", help="folder that is written to (default: %(default)s)"
    )
    parser.add_argument(
        "--label",
        default="",
        help="the label that is explained (default: the most probable one of each file)",
    )
    parser.add_argument(
        "--at",
        type=float,
        help="explain the window around these seconds (default: that in which the label is most probable)",
    )
    parser.add_argument(
        "--layer", default="", help="the layer of --unit; without --unit, the layer of Grad-CAM"
    )
    parser.add_argument(
        "--unit", type=int, help="a unit of --layer that is explained and sounded, too"
    )
    parser.add_argument(
        "--clips",
        nargs="+",
        default=[],
        help="files and folders in which moments are sought (default: the files)",
    )
    parser.add_argument(
        "--top", type=int, default=5, help="moments of each unit (default: %(default)s)"
    )
    parser.add_argument("--cut", action="store_true", help="cut the moments out as wav files")
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="length of what is cut out (default: %(default)s)",
    )
    parser.add_argument("--parts", default=",".join(_PARTS), help="any of %(default)s")
    parser.add_argument(
        "--list_layers",
        action="store_true",
        help="print the layers and their units, and nothing else",
    )


def run(arguments: argparse.Namespace) -> int:
    """Explains every file; returns 3 where some failed, 2 where all did."""
    from musicgenre.errors import UserError

    parts = _checked(arguments)
    if arguments.list_layers:
        from musicgenre.explain.attribution import Explainer

        print(_layers(Explainer(load_tagger(arguments).model)))
        return 0
    tally = Tally()
    files = expand(arguments.files, tally)
    if not files:
        return tally.exit_code()
    clips = expand(arguments.clips, tally) if arguments.clips else files
    tagger = load_tagger(arguments)
    job = _Job(arguments, tagger, parts)
    for path in files:
        try:
            line = job.explain(path)
        except _Unusable as error:
            tally.fail(str(error))
        else:
            tally.done += 1
            print(line, flush=True)
    if not tally.done:
        return tally.exit_code()
    moments: list[Moment] = []
    if "moments" in parts:
        from musicgenre.explain.attribution import strongest_moments

        # What failed above was reported already.
        report = tally.fail if arguments.clips else lambda message: None
        moments = strongest_moments(
            job.explainer,
            clips,
            job.units(),
            count=arguments.top,
            min_seconds=arguments.min_seconds,
            failed=report,
        )
        if not moments:
            raise UserError("--clips: none of these files can be used.")
    print(job.finish(moments))
    return tally.exit_code()


def _checked(arguments: argparse.Namespace) -> list[str]:
    """Returns the parts that are asked for.

    Raises:
      UserError: arguments that cannot be used, or not together.
    """
    from musicgenre.errors import UserError, did_you_mean

    parts: list[str] = arguments.parts.split(",")
    for name in parts:
        if name not in _PARTS:
            raise UserError(f"--parts: {name!r} is not known." + did_you_mean(name, _PARTS))
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, not {arguments.top}.")
    if not arguments.seconds > 0:
        raise UserError(f"--seconds must be positive, not {arguments.seconds:g}.")
    if arguments.unit is not None and not arguments.layer:
        raise UserError(
            "--unit goes with --layer, the layer of the unit; --list_layers names them."
        )
    if arguments.at is not None and not arguments.at >= 0:
        raise UserError(f"--at must not be negative, but is {arguments.at:g}.")
    if not arguments.files and not arguments.list_layers:
        raise UserError("name at least one sound file or folder, or ask for --list_layers.")
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise UserError(f"--out={arguments.out}: this is a file; name a folder.")
    return parts


def _layers(explainer: "Explainer") -> str:
    """Returns the layers as a table."""
    from musicgenre.models.describe import shape_text

    rows = [
        (tap.name, tap.kind, shape_text(tap.shape), f"{tap.units:,}")
        for tap in explainer.taps.values()
    ]
    rows.insert(0, ("layer", "kind", "values", "units"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            f"Grad-CAM is drawn over {explainer.last_convolution!r} unless --layer says otherwise.",
        ]
    )


class _Unusable(Exception):
    """A sound file that cannot be used; all else that goes wrong ends the command."""


class _Job:
    """One call of the command: what it has found so far.

    Raises:
      UserError: the label, the layer or the unit does not exist.
    """

    def __init__(self, arguments: argparse.Namespace, tagger: "Tagger", parts: list[str]) -> None:
        from musicgenre.errors import UserError, did_you_mean
        from musicgenre.explain.attribution import INPUT, OUTPUT, Explainer

        self.arguments, self.tagger, self.parts = arguments, tagger, parts
        self.model = tagger.model
        self.out = Path(arguments.out)
        self.explainer = Explainer(self.model)
        self.label: int | None = None
        if arguments.label:
            if arguments.label not in tagger.labels:
                raise UserError(
                    f"--label={arguments.label}: no label of this model.{did_you_mean(arguments.label, tagger.labels)}"
                )
            self.label = tagger.labels.index(arguments.label)
        # The unit that is explained beside the label, and where Grad-CAM looks.
        self.unit: tuple[str, int] | None = None
        self.over = self.explainer.last_convolution
        if arguments.unit is not None:
            self.explainer.check_unit(arguments.layer, arguments.unit)
            self.unit = (arguments.layer, arguments.unit)
        elif arguments.layer:
            if len(self.explainer.tap(arguments.layer).shape) < 2:
                known = [name for name, tap in self.explainer.taps.items() if len(tap.shape) > 1]
                raise UserError(
                    f"--layer={arguments.layer}: it has no positions that Grad-CAM could be drawn of. "
                    f"Add --unit to explain one of its units, or take one of {', '.join(known)}."
                )
            self.over = arguments.layer
        self.over_words = (
            "the input, since there is no convolution" if self.over == INPUT else self.over
        )
        self.strong: dict[
            int, None
        ] = {}  # units of the embedding that speak for what was explained
        self.pages: list[tuple[Path, str, Chosen]] = []
        self._output = OUTPUT

    def explain(self, path: str) -> str:
        """Writes the folder of one file, and returns a line about it.

        Raises:
          _Unusable: the file cannot be used.
          UserError: the folder cannot be written.
        """
        import numpy as np

        from musicgenre.audio.resample import resample
        from musicgenre.errors import UserError
        from musicgenre.explain.attribution import choose_window, read_excerpt, strongest_units
        from musicgenre.explain.plots import Section, page

        model, arguments = self.model, self.arguments
        try:
            chosen = choose_window(
                model,
                self.tagger.network,
                path,
                label=self.label,
                at=arguments.at,
                min_seconds=arguments.min_seconds,
            )
            excerpt, rate = read_excerpt(path, chosen.start, chosen.end)
        except UserError as error:
            raise _Unusable(str(error)) from error
        spec = model.features
        samples = resample(excerpt.mean(axis=1), rate, spec.sample_rate, spec.resampler)
        folder = self.out / self._folder(path)
        features = chosen.window.inputs.astype(np.float32)
        label = model.label_names[chosen.label]
        strong = strongest_units(self.explainer, features, chosen.label, _UNITS_OF_A_FILE)
        self.strong |= dict.fromkeys(strong)
        sections = [self._said(chosen)]
        title = f"{self._synthetic}{_text(Path(path).name)}"
        if "saliency" in self.parts or "sound" in self.parts:
            targets = [(self._output, chosen.label), *([self.unit] if self.unit else [])]
            found = {target: self._attributions(features, target) for target in targets}
            if "saliency" in self.parts:
                for target in targets:
                    sections.append(
                        self._saliency(
                            folder, chosen, samples, target, found[target], f"{title} · "
                        )
                    )
            if "sound" in self.parts:
                sections.append(
                    self._sounds(folder, chosen, samples, (excerpt, rate), found, strong)
                )
        if "activations" in self.parts:
            sections.append(self._activations(folder, chosen, features, title))
        page(
            folder / "index.html",
            f"{_text(Path(path).name)}: why {label}?",
            self._facts()
            | {"file": _text(path), "window": f"{_seconds(chosen)} of {chosen.seconds:.1f} s"},
            [section for section in sections if isinstance(section, Section)],
            synthetic=bool(self._synthetic),
            up="../index.html",
        )
        self.pages.append((folder, path, chosen))
        return f"{path}: {label} {self._value(chosen, chosen.label)}, {_seconds(chosen)} -> {folder / 'index.html'}"

    def units(self) -> list[tuple[str, int]]:
        """Returns the units whose moments are sought."""
        from musicgenre.explain.attribution import EMBEDDING

        if self.unit:
            return [self.unit]
        labels = [(self._output, number) for number in range(len(self.model.label_names))]
        return labels + [(EMBEDDING, unit) for unit in list(self.strong)[:_MOST_UNITS]]

    def finish(self, moments: "list[Moment]") -> str:
        """Writes the page of all files, and returns a line about it."""
        from urllib.parse import quote

        from musicgenre.explain.plots import Link, Section, page
        from musicgenre.models.describe import table

        rows = [
            (
                Link(_text(path), f"{quote(folder.name)}/index.html"),
                self.model.label_names[chosen.label],
                self._value(chosen, chosen.label),
                _seconds(chosen),
            )
            for folder, path, chosen in self.pages
        ]
        sections = [
            Section(
                "Files",
                columns=("file", "explained", "in the window", "window"),
                rows=rows,
                numbers=2,
            )
        ]
        if moments:
            sections.append(self._moments(moments))
        if "filters" in self.parts:
            sections.append(self._filters())
        sections.append(Section("Layers", listing=table(self.explainer.layers)))
        page(
            self.out / "index.html",
            f"What {self.model.config.model.name} listens to",
            self._facts(),
            sections,
            synthetic=bool(self._synthetic),
        )
        return f"{_counted(len(self.pages), 'file')} explained -> {self.out / 'index.html'}"

    @property
    def _synthetic(self) -> str:
        return "SYNTHETIC · " if self.model.dataset.get("synthetic") else ""

    def _facts(self) -> dict[str, str]:
        return {
            "model": f"{_text(self.arguments.model)}, {self.model.config.model.name} on {self.model.dataset['name']}",
            "input": f"{self.model.frames} frames, {self.model.features.describe()}",
        }

    def _folder(self, path: str) -> str:
        """Returns a name for a file's folder that is plain and not taken yet."""
        stem = (
            "".join(
                letter if letter.isalnum() or letter in "-_. " else "_"
                for letter in Path(path).stem
            ).strip(". ")
            or "_"
        )
        taken = {folder.name.lower() for folder, _, _ in self.pages} | {"moments"}
        number = 1
        while (unique := stem if number == 1 else f"{stem}-{number}").lower() in taken:
            number += 1
        return unique

    def _value(self, chosen: "Chosen", label: int, *, whole: bool = False) -> str:
        value = float((chosen.file_probabilities if whole else chosen.probabilities)[label])
        return f"{value:.4g}" if self.model.task == "regression" else f"{100 * value:.1f} %"

    def _target(self, target: tuple[str, int]) -> str:
        """Returns a unit in words."""
        layer, unit = target
        return self.model.label_names[unit] if layer == self._output else f"{layer} unit {unit}"

    def _said(self, chosen: "Chosen") -> "Section":
        from musicgenre.explain.plots import Section

        order = (-chosen.file_probabilities).argsort(kind="stable")[:10].tolist()
        rows = [
            (self.model.label_names[i], self._value(chosen, i), self._value(chosen, i, whole=True))
            for i in dict.fromkeys([*order, chosen.label])
        ]
        return Section(
            "What the model says",
            columns=("label", "this window", "the whole file"),
            rows=rows,
            numbers=2,
        )

    def _attributions(
        self, features: "np.ndarray", target: tuple[str, int]
    ) -> "tuple[Attribution, Attribution]":
        from musicgenre.explain.attribution import gradient_times_input, integrated_gradients

        return gradient_times_input(self.explainer, features, *target), integrated_gradients(
            self.explainer, features, *target
        )

    def _saliency(
        self,
        folder: Path,
        chosen: "Chosen",
        samples: "np.ndarray",
        target: tuple[str, int],
        found: "tuple[Attribution, Attribution]",
        title: str,
    ) -> "Section":
        import numpy as np

        from musicgenre.explain import plots as drawing
        from musicgenre.explain.attribution import class_map, stretched

        features = chosen.window.inputs.astype(np.float32)
        times, path = found
        label = target[0] == self._output
        name = "saliency" if label else f"saliency-{_plain(self._target(target))}"
        panel, length = self._panel(chosen, samples), chosen.window.length
        what = (
            "activation" if not label else "value" if self.model.task == "regression" else "logit"
        )
        maps: list[drawing.MapPanel] = []
        for attribution, words in (
            (times, "gradient × input: red speaks for it, blue against"),
            (path, "integrated gradients: what this sound adds to silence"),
        ):
            heard = attribution.heard[:length]
            if self.model.features.kind == "waveform":
                maps.append(drawing.MapPanel(heard.ravel(), words, what))
            else:
                maps.append(drawing.MapPanel(heard, words, f"adds to the {what}"))
        arrays: dict[str, Any] = {
            "gradient_times_input": times.values,
            "integrated_gradients": path.values,
        }
        if label:
            positions = class_map(self.explainer, features, *target, self.over)
            grid = stretched(positions, len(features), panel.values.shape[1])[:length]
            # The picture of a waveform has a hop of its own.
            grid = stretched(grid, *panel.values.shape) if len(grid) != len(panel.values) else grid
            maps.append(
                drawing.MapPanel(
                    grid, f"Grad-CAM over {self.over_words}", "weighted activation", signed=False
                )
            )
            arrays["grad_cam"] = positions
        words = self._target(target)
        drawing.saliency(folder / f"{name}.png", panel, maps, f"{title}what speaks for {words}")
        arrays |= {
            "start": np.float64(chosen.start),
            "end": np.float64(chosen.end),
            "target": np.array(words),
        }
        _save(folder / f"{name}.npz", arrays)
        total = float(path.values.sum())
        texts = [
            f"The {what} of {words} is {times.score:.3f} here and {path.reference:.3f} in silence; the difference is "
            f"{path.score - path.reference:.3f}, and the integrated gradients add up to {total:.3f}. "
            "The zero of gradient × input is the mean of the training clips. Colours end at the 99.5th percentile."
        ]
        if label and not np.any(arrays["grad_cam"]):
            texts.append(
                "Grad-CAM is zero everywhere: no position of that layer speaks for this label."
            )
        return drawing.Section(
            f"What speaks for {words}",
            texts,
            [(f"{name}.png", f"Spectrogram, and what of it speaks for {words} and against it")],
        )

    def _panel(self, chosen: "Chosen", samples: "np.ndarray") -> "TimePanel":
        """Returns the picture of the window's sound, of its real frames."""
        import dataclasses

        import numpy as np

        from musicgenre.audio.features import compute_features
        from musicgenre.explain.attribution import heard_bands
        from musicgenre.studies.figures import feature_panel

        spec = _drawn(self.model.features)
        if self.model.features.kind == "waveform":
            features = compute_features(samples, spec)
        else:
            features = heard_bands(
                chosen.window.inputs[: chosen.window.length].astype(np.float32), self.model.features
            )
        panel = feature_panel(features, spec)
        if self.model.features.kind == "mfcc":
            panel = dataclasses.replace(
                panel,
                name="mel spectrogram in dB, as far as the MFCCs keep it",
                limits=None,
                unit="dB",
            )
        return dataclasses.replace(panel, start=chosen.start + panel.start)

    def _sounds(
        self,
        folder: Path,
        chosen: "Chosen",
        samples: "np.ndarray",
        excerpt: "tuple[np.ndarray, int]",
        found: "dict[tuple[str, int], tuple[Attribution, Attribution]]",
        strong: list[int],
    ) -> "Section":
        import numpy as np

        from musicgenre.explain.attribution import (
            EMBEDDING,
            integrated_gradients,
            invert,
            listening_mask,
            through_mask,
            write_sound,
        )
        from musicgenre.explain.plots import Section, Sound

        spec, length = self.model.features, chosen.window.length
        features = chosen.window.inputs.astype(np.float32)
        sounds: list[Sound] = []

        def add(name: str, words: str, values: "np.ndarray", rate: int = spec.sample_rate) -> None:
            write_sound(folder / f"{name}.wav", values, rate)
            sounds.append(Sound(words, f"{name}.wav"))

        add("original", "the window as it is in the file", *excerpt)
        waveform = spec.kind == "waveform"
        if not waveform:
            add(
                "input",
                "what the network is given of it, made audible",
                invert(features[:length], spec),
            )
        heard = {target: path.heard for target, (_, path) in found.items()}
        if not self.unit:
            # The one unit of the embedding that speaks most for the label.
            for unit in strong[:1]:
                heard[EMBEDDING, unit] = integrated_gradients(
                    self.explainer, features, EMBEDDING, unit, steps=32
                ).heard
        for target, values in heard.items():
            mask = listening_mask(values[:length], spec)
            words, name = self._target(target), _plain(self._target(target))
            part = features[:length].ravel() if waveform else samples
            add(
                f"listens-{name}",
                f"{words}: what of the sound speaks for it",
                through_mask(part, spec, mask),
            )
            if not waveform:
                add(
                    f"inverted-{name}",
                    f"{words}: the same, made from the spectrogram alone",
                    invert(features[:length], spec, mask),
                )
        texts = [
            "What speaks for a label or a unit is the positive part of its integrated gradients, smoothed. It is laid over the "
            "sound as a mask. What is made from the spectrogram alone has phases found by Griffin and Lim's iteration."
        ]
        return Section("How it sounds", texts, sounds=sounds)

    def _activations(
        self, folder: Path, chosen: "Chosen", features: "np.ndarray", title: str
    ) -> "Section":
        import numpy as np

        from musicgenre.explain import plots as drawing

        values = {
            name: array[0] for name, array in self.explainer.activations(features[None]).items()
        }
        _save(folder / "activations.npz", values)
        drawn: dict[str, np.ndarray] = {}
        for name, array in values.items():
            # Dropout leaves things as they are, and the last layer gives the output.
            others = [*drawn.values(), *([values[self._output]] if name != self._output else [])]
            if not any(
                array.shape == other.shape and np.array_equal(array, other) for other in others
            ):
                drawn[name] = array.reshape(*array.shape[:2], -1) if array.ndim > 3 else array
        drawing.activations(
            folder / "activations.png",
            drawn,
            f"{title} · activations of {self.model.config.model.name}",
            span=(chosen.start, chosen.end),
            labels=self.model.label_names,
        )
        return drawing.Section(
            "Activations",
            [
                "What each layer returns, before an activation function that is no layer. All values: activations.npz."
            ],
            [("activations.png", "Values of every layer, from the input to the output")],
        )

    def _filters(self) -> "Section":
        from musicgenre.explain import plots as drawing
        from musicgenre.explain.attribution import first_filters, frequency_responses
        from musicgenre.studies.figures import feature_panel

        spec, pictures = self.model.features, []
        hop = 1000 * spec.hop_length / spec.sample_rate
        for found in first_filters(self.model, self.explainer.layers):
            path = self.out / f"filters-{_plain(found.layer)}.png"
            title = f"{self._synthetic}filters of {found.layer} · {self.model.config.model.name} on {self.model.dataset['name']}"
            count, bands, frames = found.kernels.shape
            if found.form == "waveform":
                taps = found.kernels[:, 0]
                decibels, hertz, _ = frequency_responses(taps, spec.sample_rate)
                drawing.frequency_responses(
                    path, decibels, hertz, f"{title} · {count} filters of {frames} samples"
                )
            else:
                kind = {
                    "logmel": "mel band",
                    "mfcc": "coefficient",
                    "stft": "frequency bin",
                    "waveform": "sample",
                }[spec.kind]
                across = f"time: {_counted(frames, 'frame')}, {hop:.3g} ms apart"
                up = _counted(bands, kind) + (", the lowest at the bottom" if bands > 1 else "")
                ticks = None
                if found.form == "bands" and spec.kind in ("logmel", "stft"):
                    import numpy as np

                    ticks = feature_panel(np.zeros((1, bands), np.float32), spec).yticks
                    up = "frequency (Hz)"
                drawing.filters(path, found.kernels, title, across=across, up=up, yticks=ticks)
            pictures.append((path.name, f"Kernels of {found.layer}"))
        texts = [] if pictures else ["The layers that see the input have no kernels."]
        return drawing.Section("First-layer filters", texts, pictures)

    def _moments(self, moments: "list[Moment]") -> "Section":
        """Writes `moments.csv`, cuts the moments out where that was asked for, and prints the strongest of each unit."""
        import csv

        from musicgenre.explain.attribution import read_excerpt, write_sound
        from musicgenre.explain.plots import Section, Sound
        from musicgenre.files import replacing

        half = self.arguments.seconds / 2
        rows: list[tuple[str, str, str, str, str, str]] = []
        cells: list[tuple[Any, ...]] = []
        rank = 0
        for number, moment in enumerate(moments):
            target = (moment.layer, moment.unit)
            rank = (
                rank + 1
                if number and target == (moments[number - 1].layer, moments[number - 1].unit)
                else 1
            )
            words = self._target(target)
            if rank == 1:
                print(f"{words}  {moment.activation:.4g}  {moment.path}  {moment.time:.1f} s")
            rows.append(
                (
                    moment.layer,
                    str(moment.unit),
                    words,
                    str(rank),
                    moment.path,
                    f"{moment.time:.3f}",
                )
            )
            cell: tuple[Any, ...] = (
                words,
                str(rank),
                _text(moment.path),
                _clock(moment.time),
                f"{moment.activation:.4g}",
            )
            if self.arguments.cut:
                name = f"{_plain(words)}-{rank}.wav"
                samples, rate = read_excerpt(
                    moment.path, max(moment.time - half, 0), moment.time + half
                )
                write_sound(self.out / "moments" / name, samples, rate)
                cell = (*cell, Sound(words, f"moments/{name}"))
            cells.append(cell)
        with (
            replacing(self.out / "moments.csv") as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                [
                    "layer",
                    "unit",
                    "label",
                    "rank",
                    "file",
                    "time",
                    "window_start",
                    "window_end",
                    "activation",
                ]
            )
            for row, moment in zip(rows, moments, strict=True):
                writer.writerow(
                    [*row, f"{moment.start:.3f}", f"{moment.end:.3f}", f"{moment.activation:.6g}"]
                )
        columns = (
            "unit",
            "rank",
            "file",
            "time (min:s)",
            "activation",
            *(["sound"] if self.arguments.cut else []),
        )
        texts = [
            "The windows in which a unit reaches its highest values, and the time in them at which it does. Of a unit without "
            "time, as a label, it is the middle of the second that speaks most for it. For labels the activation is "
            f"{'the output' if self.model.task == 'regression' else 'the probability'}. All: moments.csv."
        ]
        return Section(
            "Strongest moments",
            texts,
            columns=columns,
            rows=cells,
            numbers=3 if self.arguments.cut else 2,
        )


def _drawn(spec: "FeatureSpec") -> "FeatureSpec":
    """Returns the front end of the picture: the model's own, or a mel spectrogram where that has no bands one can hear."""
    import dataclasses

    from musicgenre.audio.features import FeatureSpec

    if spec.kind == "waveform":
        return FeatureSpec(sample_rate=spec.sample_rate, hop_length=512)
    return dataclasses.replace(spec, kind="logmel") if spec.kind == "mfcc" else spec


def _save(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    from musicgenre.files import replacing

    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _plain(words: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in words)


def _text(path: str) -> str:
    """Returns a file's name as text, whatever its bytes are."""
    return path.encode("utf-8", "replace").decode()


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _seconds(chosen: "Chosen") -> str:
    """Returns the window's time, such as "0.0-30.0 s", or "28:00.0-28:30.0" where it ends after five minutes."""
    if chosen.end <= 300:
        return f"{chosen.start:.1f}-{chosen.end:.1f} s"
    return f"{_clock(chosen.start)}-{_clock(chosen.end)}"


def _clock(seconds: float) -> str:
    """Returns minutes and seconds, such as "6:12.3"."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
