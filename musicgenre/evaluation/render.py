"""How reports show things: names and values of measures, intervals, tables and HTML pages."""

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

# Names for people of the measures, in the order in which reports show them.
MEASURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "top3_accuracy": "top-3 accuracy",
    "macro_roc_auc": "macro ROC-AUC",
    "macro_pr_auc": "macro PR-AUC",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "nll": "negative log likelihood",
    "ece": "calibration error",
    "brier": "Brier score",
    **{name: name for name in ("r2", "mse", "mae", "correlation")},
}
IN_PERCENT = ("accuracy", "balanced_accuracy", "top3_accuracy", "ece")


def measure_name(key: str) -> str:
    """Returns the name of a measure for people, such as "macro ROC-AUC" for `macro_roc_auc`."""
    return MEASURES.get(key, key.replace("_", " "))


def value_text(name: str, value: float | None) -> str:
    """Returns a measure's value, such as "48.7 %" for an accuracy and "0.870" for an area."""
    if value is None:
        return "undefined"
    return f"{100 * value:.1f} %" if name in IN_PERCENT else f"{value:.3f}"


def range_text(name: str, interval: Sequence[float]) -> str:
    """Returns an interval of a measure, such as "41.8-55.7"."""
    return "-".join(value_text(name, limit).removesuffix(" %") for limit in interval)


def interval_texts(metrics: Mapping[str, Any], name: str) -> list[str]:
    """Returns the intervals of a measure, such as "95 % Wilson 41.8-55.7"; the first with level."""
    intervals = metrics.get("intervals", {})
    methods = {"wilson": "Wilson", "bootstrap": f"{intervals.get('bootstrap_unit')} bootstrap"}
    found = [
        f"{methods[method]} {range_text(name, interval)}"
        for method, interval in intervals.get(name, {}).items()
        if interval
    ]
    return [f"{100 * intervals['level']:.0f} % {found[0]}", *found[1:]] if found else []


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table; a bar in a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns the text of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    return buffer.getvalue()


def data_uri(path: Path) -> str:
    """Returns a PNG file as an address that HTML can hold."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def rendered(template: str, **values: Any) -> str:
    """Returns the page of a template of this package; in HTML, the values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = lambda value: "n/a" if value is None else f"{value:.3f}"
    environment.globals.update(
        show_value=value_text,
        show_range=range_text,
        show_intervals=interval_texts,
        measure_name=measure_name,
    )
    return environment.get_template(template).render(**values)
