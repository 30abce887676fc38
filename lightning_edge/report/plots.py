"""The plots of the page: SVG that takes its colours from the page's style sheet, so that it suits light and dark."""

import io
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lightning_edge.report.footprint import LayerFootprint
from lightning_edge.report.summary import EpochRecord, ReportRow

# Matplotlib knows no style sheet: each of these colours is replaced by a variable of the page.
_TEXT, _MUTED, _LINE, _ACCENT, _SECOND, _SOFT = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    _TEXT: "var(--text)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
    _SOFT: "var(--soft)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_edge",  # same report, same file
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
}
_WIDTH = 6.4


def bytes_plot(rows: Sequence[ReportRow]) -> str:
    """Return bars of the files' bytes, the baseline (first row) on top, as SVG."""
    return _svg(partial(_draw_bytes, rows), height=0.9 + 0.42 * len(rows), prefix="bytes-")


def error_plot(rows: Sequence[ReportRow]) -> str:
    """Return the error of each file against its bytes, with 95 % intervals, as SVG."""
    return _svg(partial(_draw_errors, rows), height=3.0, prefix="error-")


def curves_plot(history: Sequence[EpochRecord]) -> str:
    """Return validation error, sparsity and a layer's most distinct values over the epochs of all stages, as SVG.

    A curve that no epoch has a value for gets no panel; with no curve at all the SVG is empty.
    """
    curves: list[tuple[str, list[float | None]]] = [
        ("val. error, %", [_percent(record.val_error) for record in history]),
        ("sparsity, %", [_percent(record.sparsity) for record in history]),
        ("distinct values", [_number(record.distinct_values) for record in history]),
    ]
    panels = [(label, values) for label, values in curves if any(value is not None for value in values)]
    return _svg(partial(_draw_curves, history, panels), height=0.7 + 1.25 * len(panels), prefix="curves-")


def kept_plot(layers: Sequence[LayerFootprint]) -> str:
    """Return bars of the fraction of weights that each layer keeps, as SVG."""
    weighted = [layer for layer in layers if layer.weights]
    return _svg(partial(_draw_kept, weighted), height=0.9 + 0.36 * len(weighted), prefix="kept-")


def _svg(draw: Callable[[Any], None], *, height: float, prefix: str) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")  # no pyplot: nothing global to close
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several of these share one page, where an id may occur once.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _draw_bytes(rows: Sequence[ReportRow], figure: Any) -> None:
    axes = figure.add_subplot()
    sizes = [row.size_bytes for row in rows]
    axes.barh(range(len(rows)), sizes, height=0.62, color=[_SOFT] + [_ACCENT] * (len(rows) - 1))
    for y, row in enumerate(rows):
        axes.annotate(
            f"{row.size_bytes:,} B · {row.ratio:.1f}x",
            (row.size_bytes, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=_TEXT)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * max(sizes))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_kilobytes))
    axes.tick_params(length=0)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)


def _draw_errors(rows: Sequence[ReportRow], figure: Any) -> None:
    axes = figure.add_subplot()
    for n, row in enumerate(rows):
        low, high = row.error.interval_percent
        error, colour = row.error.error_percent, _SECOND if n == 0 else _ACCENT
        axes.errorbar(
            row.size_bytes,
            error,
            yerr=[[error - low], [high - error]],
            fmt="o",
            color=colour,
            capsize=3,
            elinewidth=1.2,
        )
        # Files of about the same size have their names one below the other.
        neighbours = sum(abs(math.log(other.size_bytes / row.size_bytes)) < 0.4 for other in rows[:n])
        offset = (7, 4 - 12 * neighbours)
        axes.annotate(row.name, (row.size_bytes, error), xytext=offset, textcoords="offset points", color=colour)
    axes.set_xscale("log")
    sizes = [row.size_bytes for row in rows]
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 3.0)
    axes.xaxis.set_major_formatter(FuncFormatter(_kilobytes))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes on disk (logarithmic)")
    axes.set_ylabel("test error, %")
    axes.tick_params(length=0, which="both")
    axes.grid()


def _draw_curves(
    history: Sequence[EpochRecord], panels: Sequence[tuple[str, Sequence[float | None]]], figure: Any
) -> None:
    all_axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    starts = [n for n in range(len(history)) if n == 0 or history[n].stage != history[n - 1].stage]
    for axes, (label, values) in zip(all_axes, panels, strict=False):
        points = [(n, value) for n, value in enumerate(values) if value is not None]
        axes.plot(*zip(*points, strict=True), color=_ACCENT, linewidth=1.6, marker="o", markersize=2.4)
        axes.set_ylabel(label)
        if max(value for _, value in points) > 1000:
            axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.tick_params(length=0, which="both")
        axes.grid(axis="y")
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for start in starts:
        all_axes[0].annotate(
            history[start].stage,
            (start - 0.4, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_SECOND,
        )
    figure.align_ylabels(all_axes)
    all_axes[-1].set_xlabel("epoch, all stages")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_kept(layers: Sequence[LayerFootprint], figure: Any) -> None:
    axes = figure.add_subplot()
    y = range(len(layers))
    axes.barh(y, [100] * len(layers), height=0.56, color=_SOFT)
    axes.barh(y, [100 * layer.kept for layer in layers], height=0.56, color=_ACCENT)
    for n, layer in enumerate(layers):
        text = f"{layer.nonzero:,} of {layer.weights:,}"
        axes.annotate(text, (100, n), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, [layer.name or "network" for layer in layers], color=_TEXT)
    axes.invert_yaxis()
    axes.set_xlim(0, 138)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)


def _kilobytes(size: float, _: int) -> str:
    return f"{size / 1000:g} KB" if size else "0"


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100.0 * fraction


def _number(count: int | None) -> float | None:
    return None if count is None else float(count)
