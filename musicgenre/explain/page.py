"""The pages of an explanation, with their pictures, sounds and arrays.

`Explanation.add` writes a folder per file, and `Explanation.finish` the page that links to them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup

from musicgenre.audio.features import FeatureSpec, compute_features
from musicgenre.audio.resample import resample
from musicgenre.errors import UserError, did_you_mean
from musicgenre.evaluation.plots import TimePanel
from musicgenre.evaluation.render import csv_text
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
_PLAYER = Markup(
    '<audio controls preload="none" src="{}" title="{}" style="width: {}; height: 2.2em"></audio>'
)
_TEMPLATES = jinja2.Environment(
    # The page extends that of the reports.
    loader=jinja2.ChoiceLoader(
        [jinja2.PackageLoader(f"musicgenre.{name}") for name in ("explain", "evaluation")]
    ),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_Unit = tuple[str, int]  # layer and number


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


class _Section(NamedTuple):
    """A part of a page."""

    heading: str
    text: Sequence[str] = ()  # paragraphs
    figures: Sequence[tuple[str, str]] = ()  # address of each picture, and its description
    columns: Sequence[str] = ()  # of its table; without any, the table has no head
    rows: Sequence[Sequence[str]] = ()
    numbers: int = 0  # how many of the last columns are numbers
    listing: str = ""  # preformatted text, shown on demand


class _Excerpt(NamedTuple):
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
        self._out, self._label = Path(options.out), None
        if options.label:
            if options.label not in tagger.labels:
                hint = did_you_mean(options.label, tagger.labels)
                raise UserError(f"--label={options.label}: no label of this model.{hint}")
            self._label = tagger.labels.index(options.label)
        self._unit: _Unit | None = None
        self._over = self.explainer.last_convolution  # the layer of Grad-CAM
        if options.unit is not None:
            self._unit = (options.layer, options.unit)
            self.explainer.check_unit(*self._unit)
        elif options.layer:
            try:
                self.explainer.check_positions(options.layer)
            except UserError as error:
                raise UserError(f"--layer: {error} --unit explains a unit of any layer.") from None
            self._over = options.layer
        # Units of the embedding that contribute to the explained labels, in order.
        self._strong: dict[int, None] = {}
        self._done: list[_Excerpt] = []
        self._network = f"{self.model.config.model.name} on {self.model.dataset['name']}"
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
        chosen, parts = excerpt.chosen, self.options.parts
        target = (OUTPUT, chosen.label)
        strong = strongest_units(self.explainer, excerpt.features, chosen.label, _UNITS_OF_A_FILE)
        self._strong |= dict.fromkeys(strong)
        order = (-chosen.file_probabilities).argsort(kind="stable")[:10].tolist()
        both = (chosen.probabilities, chosen.file_probabilities)
        rows = [
            (self.model.label_names[i], *(self._value(values[i]) for values in both))
            for i in dict.fromkeys([*order, chosen.label])
        ]
        columns = ("label", "this window", "the whole file")
        sections = [_Section("Predictions", columns=columns, rows=rows, numbers=2)]
        found: dict[_Unit, Attribution] = {}
        if "saliency" in parts or "sound" in parts:
            for unit in [target, *([self._unit] if self._unit else [])]:
                found[unit] = integrated_gradients(self.explainer, excerpt.features, *unit)
        if "saliency" in parts:
            sections += [self._saliency(excerpt, unit, one) for unit, one in found.items()]
        if "sound" in parts:
            sections.append(self._sounds(excerpt, found, strong))
        if "activations" in parts:
            sections.append(self._activations(excerpt))
        name, value = self._words(*target), self._value(chosen.probabilities[chosen.label])
        facts = {"file": _text(path), "window": f"{excerpt.span} of {chosen.seconds:.1f} s"}
        self._write(excerpt.folder, f"{_text(Path(path).name)}: why {name}?", sections, facts)
        self._done.append(excerpt)
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
        link = Markup('<a href="{}/index.html">{}</a>')
        rows = [
            (
                link.format(quote(folder.name), _text(path)),
                self.model.label_names[chosen.label],
                self._value(chosen.probabilities[chosen.label]),
                excerpt.span,
            )
            for excerpt in self._done
            for path, folder, chosen in [excerpt[:3]]
        ]
        columns = ("file", "explained", "in the window", "window")
        sections = [_Section("Files", columns=columns, rows=rows, numbers=2)]
        if "moments" in self.options.parts:
            units = [(OUTPUT, number) for number in range(len(self.model.label_names))]
            units += [(EMBEDDING, unit) for unit in list(self._strong)[:_MOST_UNITS]]
            moments = strongest_moments(
                self.explainer,
                [excerpt.path for excerpt in self._done] if clips is None else clips,
                [self._unit] if self._unit else units,
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
        sections.append(_Section("Layers", listing=table(self.explainer.layers)))
        self._write(self._out, f"What {self.model.config.model.name} responds to", sections)
        yield f"{_counted(len(self._done), 'file')} explained -> {self._out / 'index.html'}"

    def _read(self, path: str) -> _Excerpt:
        spec, at, least = self.model.features, self.options.at, self.tagger.min_seconds
        try:
            chosen = choose_window(
                self.model, self.tagger.network, path, label=self._label, at=at, min_seconds=least
            )
            original, rate = sonify.read_excerpt(path, chosen.start, chosen.end)
        except UserError as error:
            raise UnusableFile(str(error)) from error
        samples = resample(original.mean(axis=1), rate, spec.sample_rate, spec.resampler)
        # A folder name that is plain and not in use.
        stem = _plain(Path(path).stem, "-_. ").strip(". ") or "_"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        taken = {done.folder.name.lower() for done in self._done} | {"moments"}
        folder = self._out / next(name for name in names if name.lower() not in taken)
        features = chosen.window.inputs.astype(np.float32)
        return _Excerpt(path, folder, chosen, features, original, rate, samples)

    def _write(
        self,
        folder: Path,
        title: str,
        sections: Sequence[_Section],
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a page; further facts mark the page of a file."""
        text = _TEMPLATES.get_template("explain.html.j2").render(
            title=title,
            facts=self._facts | dict(facts or {}),
            sections=sections,
            synthetic=bool(self._synthetic),
            up="../index.html" if facts else "",
        )
        write_text(folder / "index.html", text)

    def _title(self, excerpt: _Excerpt, what: str) -> str:
        return f"{self._synthetic}{_text(Path(excerpt.path).name)} · {what}"

    def _value(self, value: float) -> str:
        return f"{value:.4g}" if self.model.task == "regression" else f"{100 * value:.1f} %"

    def _words(self, layer: str, unit: int) -> str:
        return self.model.label_names[unit] if layer == OUTPUT else f"{layer} unit {unit}"

    def _saliency(self, excerpt: _Excerpt, target: _Unit, path: Attribution) -> _Section:
        times = gradient_times_input(self.explainer, excerpt.features, *target)
        label, words = target[0] == OUTPUT, self._words(*target)
        name, what = f"saliency-{_plain(words)}", "activation"
        if label:
            name, what = "saliency", "value" if self.model.task == "regression" else "logit"
        panel, length = self._panel(excerpt), excerpt.chosen.window.length
        headings = {
            "gradient × input: red is evidence for, blue against": times,
            "integrated gradients: what this sound adds to silence": path,
        }
        maps = [
            plots.MapPanel(found.spectral[:length].ravel(), heading, what)
            if self.model.features.kind == "waveform"
            else plots.MapPanel(found.spectral[:length], heading, f"contribution to the {what}")
            for heading, found in headings.items()
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
                texts += ["Grad-CAM is zero: no position of the layer is evidence for the label."]
        title = self._title(excerpt, f"evidence for {words}")
        plots.saliency(excerpt.folder / f"{name}.png", panel, maps, title)
        _save(excerpt.folder / f"{name}.npz", arrays)
        caption = f"Spectrogram, and the evidence in it for and against {words}"
        return _Section(f"Evidence for {words}", texts, [(f"{name}.png", caption)])

    def _panel(self, excerpt: _Excerpt) -> TimePanel:
        """Returns the spectrogram of the window's real frames."""
        spec = self.model.features
        if spec.kind == "waveform":
            drawn = FeatureSpec(sample_rate=spec.sample_rate, hop_length=512)
            panel = feature_panel(compute_features(excerpt.samples, drawn), drawn)
        else:
            features = excerpt.features[: excerpt.chosen.window.length]
            drawn = dataclasses.replace(spec, kind="logmel") if spec.kind == "mfcc" else spec
            panel = feature_panel(spectral_bands(features, spec), drawn)
        if spec.kind == "mfcc":
            name = "mel spectrogram in dB, as far as the MFCCs keep it"
            panel = dataclasses.replace(panel, name=name, limits=None, unit="dB")
        return dataclasses.replace(panel, start=excerpt.chosen.start + panel.start)

    def _sounds(
        self, excerpt: _Excerpt, found: Mapping[_Unit, Attribution], strong: Sequence[int]
    ) -> _Section:
        """Writes the window's sound, and what a mask of each unit's evidence leaves of it."""
        spec = self.model.features
        features = excerpt.features[: excerpt.chosen.window.length]
        waveform, rows = spec.kind == "waveform", []

        def add(name: str, words: str, values: np.ndarray, rate: int = spec.sample_rate) -> None:
            sonify.write_sound(excerpt.folder / f"{name}.wav", values, rate)
            rows.append((words, _PLAYER.format(f"{name}.wav", words, "24em")))

        add("original", "the window as it is in the file", excerpt.original, excerpt.rate)
        if not waveform:
            add("input", "the network's input, as sound", sonify.invert(features, spec))
        found = dict(found)
        for unit in [] if self._unit else strong[:1]:
            found[EMBEDDING, unit] = integrated_gradients(
                self.explainer, excerpt.features, EMBEDDING, unit, steps=32
            )
        for target, one in found.items():
            mask = sonify.attribution_mask(one.spectral[: len(features)], spec)
            words, name = self._words(*target), _plain(self._words(*target))
            part = features.ravel() if waveform else excerpt.samples
            masked = sonify.apply_mask(part, spec, mask)
            add(f"masked-{name}", f"{words}: the evidence for it in the sound", masked)
            if not waveform:
                inverted = sonify.invert(features, spec, mask)
                add(f"inverted-{name}", f"{words}: the same, from the spectrogram alone", inverted)
        return _Section("As sound", [_SOUNDS], rows=rows, numbers=1)

    def _activations(self, excerpt: _Excerpt) -> _Section:
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
        return _Section("Activations", [_ACTIVATIONS], [("activations.png", caption)])

    def _filters(self) -> _Section:
        spec, pictures = self.model.features, []
        for found in taps.first_filters(self.explainer):
            path = self._out / f"filters-{_plain(found.layer)}.png"
            pictures.append((path.name, f"Kernels of {found.layer}"))
            title = f"{self._synthetic}filters of {found.layer} · {self._network}"
            count, bands, frames = found.kernels.shape
            if found.form == "waveform":
                title += f" · {count} filters of {frames} samples"
                responses = taps.frequency_responses(found.kernels[:, 0], spec.sample_rate)
                plots.frequency_responses(path, *responses, title)
                continue
            hop = 1000 * spec.hop_length / spec.sample_rate
            across = f"time: {_counted(frames, 'frame')}, {hop:.3g} ms apart"
            up = _counted(bands, _BANDS.get(spec.kind, "sample"))
            ticks: Mapping[float, str] = {}
            if found.form == "bands" and spec.kind in ("logmel", "stft"):
                up = "frequency (Hz)"
                ticks = feature_panel(np.zeros((1, bands)), spec).yticks
            elif bands > 1:
                up += ", the lowest at the bottom"
            plots.filters(path, found.kernels, title, across=across, up=up, yticks=ticks)
        texts = [] if pictures else ["The layers that receive the input have no kernels."]
        return _Section("First-layer filters", texts, pictures)

    def _moments(self, moments: Sequence[Moment]) -> tuple[_Section, list[str]]:
        """Writes `moments.csv` and cut sounds; returns a section, and a line per unit."""
        half, cut = self.options.seconds / 2, self.options.cut
        cells, rows, lines = [], [], []
        for (layer, unit), some in itertools.groupby(moments, lambda moment: moment[:2]):
            words = self._words(layer, unit)
            for rank, moment in enumerate(some, 1):
                numbers = [f"{value:.3f}" for value in moment[3:6]] + [f"{moment.activation:.6g}"]
                rows.append([layer, unit, words, rank, moment.path, *numbers])
                value = f"{moment.activation:.4g}"
                cell = [words, str(rank), _text(moment.path), clock(moment.time), value]
                if cut:
                    name = f"moments/{_plain(words)}-{rank}.wav"
                    span = (max(moment.time - half, 0), moment.time + half)
                    sonify.write_sound(self._out / name, *sonify.read_excerpt(moment.path, *span))
                    cell.append(_PLAYER.format(name, words, "14em"))
                cells.append(cell)
                if rank == 1:
                    lines.append(f"{words}  {value}  {moment.path}  {moment.time:.1f} s")
        with replacing(self._out / "moments.csv") as temporary:
            # Paths may not be UTF-8.
            text = csv_text(_CSV_COLUMNS.split(), rows)
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        what = "the output" if self.model.task == "regression" else "the probability"
        columns = ["unit", "rank", "file", "time (min:s)", "activation", *["sound"][: int(cut)]]
        text = _MOMENTS.format(what)
        return _Section("Strongest moments", [text], (), columns, cells, len(columns) - 3), lines


def layer_table(explainer: Explainer) -> str:
    """Returns the layers, their types, shapes and units as a table."""
    rows = [("layer", "type", "values", "units")]
    for tap in explainer.taps.values():
        rows.append((tap.name, tap.type, shape_text(tap.shape), f"{tap.units:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    default = f"Grad-CAM uses {explainer.last_convolution!r} unless --layer names another layer."
    return "\n".join([*lines, default])


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _plain(words: str, others: str = "-_") -> str:
    """Returns words with each character but letters, digits and `others` replaced by "_"."""
    return "".join(letter if letter.isalnum() or letter in others else "_" for letter in words)


def _text(path: str) -> str:
    """Returns a file's name as text, even if its bytes are not UTF-8."""
    return path.encode("utf-8", "replace").decode()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def clock(seconds: float) -> str:
    """Returns minutes and seconds, such as "6:12.3"."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"
