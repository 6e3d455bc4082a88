"""The pages of an explanation, with their pictures, sounds and arrays.

`Explanation.add` writes a folder per file, and `Explanation.finish` the page that links to them.
"""

import csv
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.resample import resample
from musicgenre.errors import UserError, did_you_mean
from musicgenre.evaluation.plots import TimePanel
from musicgenre.explain import plots, sonify, taps
from musicgenre.explain.attribution import (
    Attribution,
    class_map,
    gradient_times_input,
    integrated_gradients,
    spectral_bands,
    stretched,
    strongest_units,
)
from musicgenre.explain.moments import Chosen, Moment, choose_window, strongest_moments
from musicgenre.explain.taps import EMBEDDING, INPUT, OUTPUT, Explainer
from musicgenre.files import replacing, write_text
from musicgenre.inference.spectrogram import feature_panel
from musicgenre.inference.tagger import Tagger
from musicgenre.models.describe import shape_text, table

PARTS = ("filters", "activations", "saliency", "sound", "moments")
# Units of the embedding whose moments are searched: per file, and in total.
_UNITS_OF_A_FILE, _MOST_UNITS = 3, 9
# Names of one band of each type of features.
_BANDS = {"logmel": "mel band", "mfcc": "coefficient", "stft": "frequency bin"}
_CSV_COLUMNS = "layer unit label rank file time window_start window_end activation"
_MOMENTS = (
    "The windows in which a unit reaches its highest values, and when it does. For a unit without "
    "a time axis, such as a label, it is the middle of the second with most evidence for it. The "
    "activation of a label is {}. All moments: moments.csv."
)
_SOUNDS = (
    "The evidence for a label or a unit is the positive part of its integrated gradients, "
    "smoothed, and applied to the sound as a mask. Sounds from the spectrogram alone have phases "
    "from the Griffin-Lim algorithm."
)
_ACTIVATIONS = (
    "The output of each layer, before an activation function that is not a layer. All values: "
    "activations.npz."
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to explain, and where to write it.

    Attributes:
      out: the folder to write.
      label: the label to explain; "" for the most probable label of each file.
      at: explain the window around these seconds; None for that in which the label is most
        probable.
      layer: the layer of `unit`; without a unit, the layer of Grad-CAM ("" for the last
        convolution).
      unit: a unit of `layer` to explain as well.
      top: moments per unit.
      cut: cut the moments out as WAV files.
      seconds: length of a cut moment.
      parts: any of `PARTS`.

    Raises:
      UserError: a value that is out of range, or values that contradict each other.
    """

    out: str = "explained"
    label: str = ""
    at: float | None = None
    layer: str = ""
    unit: int | None = None
    top: int = 5
    cut: bool = False
    seconds: float = 3.0
    parts: Sequence[str] = PARTS

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise UserError(f"--parts: {name!r} is not known." + did_you_mean(name, PARTS))
        if self.top < 1:
            raise UserError(f"--top must be at least 1, not {self.top}.")
        if not self.seconds > 0:
            raise UserError(f"--seconds must be positive, not {self.seconds:g}.")
        if self.unit is not None and not self.layer:
            raise UserError("--unit requires --layer, the unit's layer; see --list_layers.")
        if self.at is not None and not self.at >= 0:
            raise UserError(f"--at must not be negative, but is {self.at:g}.")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"--out={self.out}: this is a file; name a folder.")


class UnusableFile(UserError):
    """A sound file that cannot be used. Other files can still be explained."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
      heading: its title.
      text: paragraphs.
      figures: address of each picture, and its description.
      columns: names of its table's columns; without any, the table has no head.
      rows: of its table.
      numbers: how many of the last columns are numbers.
      listing: preformatted text, shown on demand.
    """

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: int = 0
    listing: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Excerpt:
    """The explained window of a file: the network's input and its sound at two rates."""

    path: str
    folder: Path
    chosen: Chosen
    features: np.ndarray  # float32 `[frames, bands]`
    original: np.ndarray  # `[samples, channels]` at the file's own rate
    rate: int
    samples: np.ndarray  # mono at the model's rate

    @property
    def span(self) -> str:
        """The window's time, such as "0.0-30.0 s", or "28:00.0-28:30.0" beyond five minutes."""
        start, end = self.chosen.start, self.chosen.end
        return f"{start:.1f}-{end:.1f} s" if end <= 300 else f"{clock(start)}-{clock(end)}"


class Explanation:
    """The folder of pages of one call.

    Args:
      tagger: the model.
      options: what to explain.
      model_name: what the pages call the model.

    Raises:
      UserError: the label, the layer or the unit does not exist.
    """

    def __init__(self, tagger: Tagger, options: Options, model_name: str = "") -> None:
        self.tagger, self.options, self.model = tagger, options, tagger.model
        self.explainer = Explainer(self.model)
        self._out = Path(options.out)
        self._label: int | None = None
        if options.label:
            if options.label not in tagger.labels:
                hint = did_you_mean(options.label, tagger.labels)
                raise UserError(f"--label={options.label}: no label of this model.{hint}")
            self._label = tagger.labels.index(options.label)
        self._unit: tuple[str, int] | None = None
        self._over = self.explainer.last_convolution  # the layer of Grad-CAM
        if options.unit is not None:
            self.explainer.check_unit(options.layer, options.unit)
            self._unit = (options.layer, options.unit)
        elif options.layer:
            try:
                self.explainer.check_positions(options.layer)
            except UserError as error:
                raise UserError(f"--layer: {error} --unit explains a unit of any layer.") from None
            self._over = options.layer
        # Units of the embedding that contribute to the explained labels, in order.
        self._strong: dict[int, None] = {}
        self._done: list[_Excerpt] = []
        name, dataset = self.model.config.model.name, self.model.dataset["name"]
        self._network = f"{name} on {dataset}"
        self._synthetic = "SYNTHETIC · " if self.model.dataset.get("synthetic") else ""
        self._facts = {
            "model": f"{_text(model_name)}, {self._network}".lstrip(", "),
            "input": f"{self.model.frames} frames, {self.model.features.describe()}",
        }

    def add(self, path: str) -> str:
        """Writes the folder of one file, and returns a line about it.

        Raises:
          UnusableFile: the file cannot be used.
          UserError: the folder cannot be written.
        """
        excerpt = self._read(path)
        target, parts = (OUTPUT, excerpt.chosen.label), self.options.parts
        strong = strongest_units(self.explainer, excerpt.features, target[1], _UNITS_OF_A_FILE)
        self._strong |= dict.fromkeys(strong)
        sections = [self._predictions(excerpt.chosen)]
        paths = {}
        if "saliency" in parts or "sound" in parts:
            for one in [target, *([self._unit] if self._unit else [])]:
                paths[one] = integrated_gradients(self.explainer, excerpt.features, *one)
        if "saliency" in parts:
            sections += [self._saliency(excerpt, one, path) for one, path in paths.items()]
        if "sound" in parts:
            sections.append(self._sounds(excerpt, paths, strong))
        if "activations" in parts:
            sections.append(self._activations(excerpt))
        name = self._words(*target)
        self._write(
            excerpt.folder,
            f"{_text(Path(path).name)}: why {name}?",
            sections,
            {"file": _text(path), "window": f"{excerpt.span} of {excerpt.chosen.seconds:.1f} s"},
        )
        self._done.append(excerpt)
        value = self._value(excerpt.chosen.probabilities[target[1]])
        return f"{path}: {name} {value}, {excerpt.span} -> {excerpt.folder / 'index.html'}"

    def finish(
        self, clips: Sequence[str] | None = None, failed: Callable[[str], None] | None = None
    ) -> Iterator[str]:
        """Writes the page of all files, and yields lines about the moments and the page.

        Args:
          clips: files to search for moments; None for those that were explained.
          failed: receives the reason why one of `clips` cannot be used.

        Raises:
          UserError: no clip can be used, or the page cannot be written.
        """
        rows = [
            (
                Markup('<a href="{}/index.html">{}</a>').format(
                    quote(excerpt.folder.name), _text(excerpt.path)
                ),
                self.model.label_names[excerpt.chosen.label],
                self._value(excerpt.chosen.probabilities[excerpt.chosen.label]),
                excerpt.span,
            )
            for excerpt in self._done
        ]
        columns = ("file", "explained", "in the window", "window")
        sections = [Section("Files", columns=columns, rows=rows, numbers=2)]
        if "moments" in self.options.parts:
            moments = strongest_moments(
                self.explainer,
                [excerpt.path for excerpt in self._done] if clips is None else clips,
                self._units(),
                count=self.options.top,
                min_seconds=self.tagger.min_seconds,
                failed=failed,
            )
            if not moments:
                raise UserError("--clips: none of these files can be used.")
            section, lines = self._moments(moments)
            sections.append(section)
            yield from lines
        if "filters" in self.options.parts:
            sections.append(self._filters())
        sections.append(Section("Layers", listing=table(self.explainer.layers)))
        self._write(self._out, f"What {self.model.config.model.name} responds to", sections)
        yield f"{_counted(len(self._done), 'file')} explained -> {self._out / 'index.html'}"

    def _read(self, path: str) -> _Excerpt:
        spec = self.model.features
        try:
            chosen = choose_window(
                self.model,
                self.tagger.network,
                path,
                label=self._label,
                at=self.options.at,
                min_seconds=self.tagger.min_seconds,
            )
            original, rate = sonify.read_excerpt(path, chosen.start, chosen.end)
        except UserError as error:
            raise UnusableFile(str(error)) from error
        samples = resample(original.mean(axis=1), rate, spec.sample_rate, spec.resampler)
        # A folder name that is plain and not in use.
        stem = _plain(Path(path).stem, "-_. ").strip(". ") or "_"
        taken = {done.folder.name.lower() for done in self._done} | {"moments"}
        unique, number = stem, 1
        while unique.lower() in taken:
            number += 1
            unique = f"{stem}-{number}"
        features = chosen.window.inputs.astype(np.float32)
        return _Excerpt(path, self._out / unique, chosen, features, original, rate, samples)

    def _write(
        self,
        folder: Path,
        title: str,
        sections: Sequence[Section],
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a page; further facts mark the page of a file."""
        text = _template().render(
            title=title,
            facts=self._facts | dict(facts or {}),
            sections=sections,
            synthetic=bool(self._synthetic),
            up="../index.html" if facts else "",
        )
        write_text(folder / "index.html", text)

    def _title(self, excerpt: _Excerpt, what: str) -> str:
        return f"{self._synthetic}{_text(Path(excerpt.path).name)} · {what}"

    def _units(self) -> list[tuple[str, int]]:
        """Returns the units whose moments are searched."""
        if self._unit:
            return [self._unit]
        labels = [(OUTPUT, number) for number in range(len(self.model.label_names))]
        return labels + [(EMBEDDING, unit) for unit in list(self._strong)[:_MOST_UNITS]]

    def _value(self, value: float) -> str:
        return f"{value:.4g}" if self.model.task == "regression" else f"{100 * value:.1f} %"

    def _words(self, layer: str, unit: int) -> str:
        return self.model.label_names[unit] if layer == OUTPUT else f"{layer} unit {unit}"

    def _predictions(self, chosen: Chosen) -> Section:
        order = (-chosen.file_probabilities).argsort(kind="stable")[:10].tolist()
        rows = [
            (
                self.model.label_names[i],
                *(self._value(p[i]) for p in (chosen.probabilities, chosen.file_probabilities)),
            )
            for i in dict.fromkeys([*order, chosen.label])
        ]
        columns = ("label", "this window", "the whole file")
        return Section("Predictions", columns=columns, rows=rows, numbers=2)

    def _saliency(self, excerpt: _Excerpt, target: tuple[str, int], path: Attribution) -> Section:
        times = gradient_times_input(self.explainer, excerpt.features, *target)
        label, words = target[0] == OUTPUT, self._words(*target)
        name = "saliency" if label else f"saliency-{_plain(words)}"
        what = "value" if self.model.task == "regression" else "logit"
        what = what if label else "activation"
        panel, length = self._panel(excerpt), excerpt.chosen.window.length
        waveform = self.model.features.kind == "waveform"
        maps = [
            plots.MapPanel(
                found.spectral[:length].ravel() if waveform else found.spectral[:length],
                heading,
                what if waveform else f"contribution to the {what}",
            )
            for found, heading in (
                (times, "gradient × input: red is evidence for, blue against"),
                (path, "integrated gradients: what this sound adds to silence"),
            )
        ]
        arrays: dict[str, Any] = {
            "gradient_times_input": times.values,
            "integrated_gradients": path.values,
            "start": np.float64(excerpt.chosen.start),
            "end": np.float64(excerpt.chosen.end),
            "target": np.array(words),
        }
        texts = [
            f"The {what} of {words} is {times.score:.3f} here and {path.reference:.3f} in silence; "
            f"the difference is {path.score - path.reference:.3f}, and the integrated gradients "
            f"add up to {float(path.values.sum()):.3f}. The zero of gradient × input is the mean "
            "of the training clips. Colours end at the 99.5th percentile."
        ]
        if label:
            positions = class_map(self.explainer, excerpt.features, *target, self._over)
            grid = stretched(positions, self.model.frames, panel.values.shape[1])[:length]
            if len(grid) != len(panel.values):  # the picture of a waveform has its own hop
                grid = stretched(grid, *panel.values.shape)
            over = "the input (there is no convolution)" if self._over == INPUT else self._over
            maps.append(plots.MapPanel(grid, f"Grad-CAM over {over}", "weighted activation", False))
            arrays["grad_cam"] = positions
            if not positions.any():
                texts.append(
                    "Grad-CAM is zero: no position of the layer is evidence for the label."
                )
        title = self._title(excerpt, f"evidence for {words}")
        plots.saliency(excerpt.folder / f"{name}.png", panel, maps, title)
        _save(excerpt.folder / f"{name}.npz", arrays)
        caption = f"Spectrogram, and the evidence in it for and against {words}"
        return Section(f"Evidence for {words}", texts, [(f"{name}.png", caption)])

    def _panel(self, excerpt: _Excerpt) -> TimePanel:
        """Returns the spectrogram of the window's real frames."""
        spec = self.model.features
        if spec.kind == "waveform":
            drawn = FeatureSpec(sample_rate=spec.sample_rate, hop_length=512)
            panel = feature_panel(compute_features(excerpt.samples, drawn), drawn)
        else:
            window = excerpt.chosen.window
            drawn = dataclasses.replace(spec, kind="logmel") if spec.kind == "mfcc" else spec
            panel = feature_panel(spectral_bands(excerpt.features[: window.length], spec), drawn)
        if spec.kind == "mfcc":
            name = "mel spectrogram in dB, as far as the MFCCs keep it"
            panel = dataclasses.replace(panel, name=name, limits=None, unit="dB")
        return dataclasses.replace(panel, start=excerpt.chosen.start + panel.start)

    def _sounds(
        self, excerpt: _Excerpt, paths: Mapping[tuple[str, int], Attribution], strong: Sequence[int]
    ) -> Section:
        """Writes the window's sound, and what a mask of each unit's evidence leaves of it."""
        spec = self.model.features
        features = excerpt.features[: excerpt.chosen.window.length]
        waveform, rows = spec.kind == "waveform", []

        def add(name: str, words: str, values: np.ndarray, rate: int = spec.sample_rate) -> None:
            sonify.write_sound(excerpt.folder / f"{name}.wav", values, rate)
            rows.append((words, _player(f"{name}.wav", words, "24em")))

        add("original", "the window as it is in the file", excerpt.original, excerpt.rate)
        if not waveform:
            add("input", "the network's input, as sound", sonify.invert(features, spec))
        paths = dict(paths)
        for unit in [] if self._unit else strong[:1]:
            paths[EMBEDDING, unit] = integrated_gradients(
                self.explainer, excerpt.features, EMBEDDING, unit, steps=32
            )
        for target, path in paths.items():
            mask = sonify.attribution_mask(path.spectral[: len(features)], spec)
            words, name = self._words(*target), _plain(self._words(*target))
            part = features.ravel() if waveform else excerpt.samples
            masked = sonify.apply_mask(part, spec, mask)
            add(f"masked-{name}", f"{words}: the evidence for it in the sound", masked)
            if not waveform:
                inverted = sonify.invert(features, spec, mask)
                add(f"inverted-{name}", f"{words}: the same, from the spectrogram alone", inverted)
        return Section("As sound", [_SOUNDS], rows=rows, numbers=1)

    def _activations(self, excerpt: _Excerpt) -> Section:
        found = self.explainer.activations(excerpt.features[None])
        values = {name: array[0] for name, array in found.items()}
        _save(excerpt.folder / "activations.npz", values)
        drawn: dict[str, np.ndarray] = {}
        for name, array in values.items():
            # Dropout leaves values unchanged, and the last layer returns the output.
            others = [*drawn.values(), *([values[OUTPUT]] if name != OUTPUT else [])]
            if not any(np.array_equal(array, other) for other in others):
                drawn[name] = array
        plots.activations(
            excerpt.folder / "activations.png",
            drawn,
            self._title(excerpt, f"activations of {self.model.config.model.name}"),
            span=(excerpt.chosen.start, excerpt.chosen.end),
            labels=self.model.label_names,
        )
        caption = "Values of every layer, from the input to the output"
        return Section("Activations", [_ACTIVATIONS], [("activations.png", caption)])

    def _filters(self) -> Section:
        spec, pictures = self.model.features, []
        for found in taps.first_filters(self.model, self.explainer.layers):
            path = self._out / f"filters-{_plain(found.layer)}.png"
            title = f"{self._synthetic}filters of {found.layer} · {self._network}"
            count, bands, frames = found.kernels.shape
            if found.form == "waveform":
                decibels, hertz, _ = taps.frequency_responses(found.kernels[:, 0], spec.sample_rate)
                title += f" · {count} filters of {frames} samples"
                plots.frequency_responses(path, decibels, hertz, title)
            else:
                hop = 1000 * spec.hop_length / spec.sample_rate
                across = f"time: {_counted(frames, 'frame')}, {hop:.3g} ms apart"
                up, ticks = _counted(bands, _BANDS.get(spec.kind, "sample")), None
                if found.form == "bands" and spec.kind in ("logmel", "stft"):
                    up = "frequency (Hz)"
                    ticks = feature_panel(np.zeros((1, bands)), spec).yticks
                elif bands > 1:
                    up += ", the lowest at the bottom"
                plots.filters(path, found.kernels, title, across=across, up=up, yticks=ticks)
            pictures.append((path.name, f"Kernels of {found.layer}"))
        texts = [] if pictures else ["The layers that receive the input have no kernels."]
        return Section("First-layer filters", texts, pictures)

    def _moments(self, moments: Sequence[Moment]) -> tuple[Section, list[str]]:
        """Writes `moments.csv` and cut sounds; returns a section, and a line per unit."""
        half = self.options.seconds / 2
        ranks: dict[str, int] = {}
        cells, rows, lines = [], [], []
        for moment in moments:
            words = self._words(moment.layer, moment.unit)
            rank = ranks[words] = ranks.get(words, 0) + 1
            numbers = [f"{value:.3f}" for value in (moment.time, moment.start, moment.end)]
            numbers.append(f"{moment.activation:.6g}")
            rows.append([moment.layer, moment.unit, words, rank, moment.path, *numbers])
            value = f"{moment.activation:.4g}"
            cell = [words, str(rank), _text(moment.path), clock(moment.time), value]
            if self.options.cut:
                name = f"moments/{_plain(words)}-{rank}.wav"
                span = (max(moment.time - half, 0), moment.time + half)
                sonify.write_sound(self._out / name, *sonify.read_excerpt(moment.path, *span))
                cell.append(_player(name, words, "14em"))
            cells.append(cell)
            if rank == 1:
                lines.append(f"{words}  {value}  {moment.path}  {moment.time:.1f} s")
        with (
            replacing(self._out / "moments.csv") as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_CSV_COLUMNS.split())
            writer.writerows(rows)
        text = _MOMENTS.format(
            "the output" if self.model.task == "regression" else "the probability"
        )
        columns = ["unit", "rank", "file", "time (min:s)", "activation", "sound"]
        columns = columns if self.options.cut else columns[:-1]
        heading = "Strongest moments"
        return Section(heading, [text], [], columns, cells, len(columns) - 3), lines


def layer_table(explainer: Explainer) -> str:
    """Returns the layers, their types, shapes and units as a table."""
    rows = [("layer", "type", "values", "units")]
    rows += [
        (tap.name, tap.type, shape_text(tap.shape), f"{tap.units:,}")
        for tap in explainer.taps.values()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True))
        for row in rows
    ]
    default = f"Grad-CAM uses {explainer.last_convolution!r} unless --layer names another layer."
    return "\n".join([*lines, default])


@functools.cache
def _template() -> jinja2.Template:
    """Returns the template of a page; it extends that of the reports."""
    folders = [jinja2.PackageLoader(f"musicgenre.{name}") for name in ("explain", "evaluation")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("explain.html.j2")


def _player(source: str, title: str, width: str) -> Markup:
    """Returns the HTML of a player for a sound file next to the page."""
    player = (
        '<audio controls preload="none" src="{}" title="{}" style="width: {}; height: 2.2em">'
        "</audio>"
    )
    return Markup(player).format(source, title, width)


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _plain(words: str, others: str = "-_") -> str:
    """Returns words with each character but letters, digits and `others` replaced by "_"."""
    return "".join(letter if letter.isalnum() or letter in others else "_" for letter in words)


def _text(path: str | os.PathLike[str]) -> str:
    """Returns a file's name as text, even if its bytes are not UTF-8."""
    return os.fspath(path).encode("utf-8", "replace").decode()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """Returns minutes and seconds, such as "6:12.3"."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
