"""The sensitivity of the layers as a table, a picture and a target that can be pasted."""

import io
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_edge.report.write import markdown_table, write_text
from lightning_edge.surgery.sensitivity import SensitivityReport, SensitivityRow

# The picture is a file of its own, so its colours are final: those of Okabe and Ito (2008), told apart by everybody.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKERS = "os^Dv<>P"
_OTHERS, _TEXT, _MUTED, _LINE = "#c4c4c4", "#222222", "#555555", "#dddddd"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_edge",  # same report, same file
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
}
_SIZE = (7.2, 3.8)
_LABEL = 28  # characters


def sensitivity_plot(report: SensitivityReport, *, max_drop: float, metric: str = "metric") -> str:
    """Return one curve for each layer, the metric against its sparsity, as SVG.

    The eight layers that lose most have colours and names, most sensitive first; however many there are, the others
    stay behind them in grey. Dashed: the metric at ``max_drop``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")  # no pyplot: nothing global to close
        _draw(report, max_drop, metric, figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def print_sensitivity(
    report: SensitivityReport, *, max_drop: float, metric: str = "metric", file: IO[str] | None = None
) -> None:
    """Print the metric of every layer and sparsity, and the proposal as an override of the command line.

    Args:
        report: What to print.
        max_drop: As :meth:`SensitivityReport.propose` takes it.
        metric: What was measured.
        file: Where to; standard output by default.
    """
    console = Console(file=file, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = _columns(report)
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    proposal = report.propose(max_drop)
    for layer, curve in report.curves.items():
        table.add_row(*map(escape, _cells(layer, curve, proposal)))
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum
        )
    console.print(_title(report, metric), style="bold", markup=False, soft_wrap=True)
    console.print(table)
    # Not wrapped, so that it can be copied.
    console.print(_sentence(proposal, max_drop, metric), style="dim", markup=False, soft_wrap=True)
    if proposal:
        console.print(shlex.quote(override(proposal)), markup=False, soft_wrap=True)


def write_sensitivity(
    report: SensitivityReport, folder: str | Path, *, max_drop: float, metric: str = "metric"
) -> tuple[Path, Path, Path]:
    """Write ``sensitivity.csv``, ``sensitivity.svg`` and ``sensitivity.md`` and return their paths.

    Each file appears whole or not at all.

    Args:
        report: What to write.
        folder: Created when missing.
        max_drop: As :meth:`SensitivityReport.propose` takes it.
        metric: What was measured.
    """
    folder = Path(folder)
    table = report.write_csv(folder / "sensitivity.csv")
    picture = write_text(folder / "sensitivity.svg", sensitivity_plot(report, max_drop=max_drop, metric=metric))
    return table, picture, write_text(folder / "sensitivity.md", _markdown(report, max_drop, metric))


def override(proposal: Mapping[str, float]) -> str:
    """Return the argument of a recipe with ``callbacks.pruning`` that gives every layer its target.

    A character that the command line would take for its own becomes ``?``, which as a glob matches any.

    >>> override({"conv1": 0.5, "layers.0": 0.9})
    'callbacks.pruning.sparsity={conv1:0.5,layers.0:0.9}'
    """
    pairs = [f"{re.sub(r'[^A-Za-z0-9_.-]', '?', layer) or '*'}:{sparsity:g}" for layer, sparsity in proposal.items()]
    return f"callbacks.pruning.sparsity={{{','.join(pairs)}}}"


def _draw(report: SensitivityReport, max_drop: float, metric: str, figure: Any) -> None:
    axes = figure.add_subplot()
    curves = report.curves
    allowed = report.dense - max_drop if report.higher_is_better else report.dense + max_drop
    # Drawn from the least important to the most, which then lies on top; the legend reads the other way round.
    axes.axhline(allowed, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=f"{max_drop:g} worse than dense")
    ranked = sorted(curves, key=lambda layer: -sum(map(report.drop, curves[layer])))
    others = len(ranked) - len(_COLOURS)
    for rank, layer in reversed(list(enumerate(ranked))):
        named = rank < len(_COLOURS)
        axes.plot(
            [0.0, *(row.sparsity for row in curves[layer])],
            [report.dense, *(row.value for row in curves[layer])],
            color=_COLOURS[rank] if named else _OTHERS,
            marker=_MARKERS[rank] if named else None,
            markersize=3.6,
            linewidth=1.5 if named else 0.8,
            label=_label(layer) if named else f"{others} more" if rank == len(_COLOURS) else None,
        )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside right upper",
        frameon=False,
        title="most sensitive first",
        alignment="left",
    )
    axes.set_xlim(-0.01, 1.0)
    axes.xaxis.set_major_locator(MultipleLocator(0.1))
    axes.set_xlabel("sparsity of the layer, the others dense")
    axes.set_ylabel(metric)
    axes.tick_params(length=0)
    axes.grid()


def _label(layer: str) -> str:
    """Return a name that leaves the picture its room; the end of a qualified name says most."""
    return layer if 0 < len(layer) <= _LABEL else f"…{layer[1 - _LABEL :]}" if layer else "network"


def _markdown(report: SensitivityReport, max_drop: float, metric: str) -> str:
    proposal = report.propose(max_drop)
    parts = [
        "# Sensitivity of the layers",
        f"{_title(report, metric)}.",
        "![One curve for each layer](sensitivity.svg)",
        markdown_table(_columns(report), [_cells(layer, curve, proposal) for layer, curve in report.curves.items()]),
        _sentence(proposal, max_drop, metric),
        *([f"    {shlex.quote(override(proposal))}"] if proposal else []),
        f"Network: sha256 {report.network}",
    ]
    return "\n\n".join(parts) + "\n"


def _title(report: SensitivityReport, metric: str) -> str:
    return f"{metric} with one layer pruned, all others dense; dense {report.dense:#.4g}"


def _columns(report: SensitivityReport) -> list[str]:
    steps = sorted({row.sparsity for row in report.rows})
    return ["layer", "weights", *(f"{step:g}" for step in steps), "proposed"]


def _cells(layer: str, curve: tuple[SensitivityRow, ...], proposal: Mapping[str, float]) -> list[str]:
    values = [f"{row.value:#.4g}" for row in curve]
    return [layer or "network", f"{curve[0].size:,}", *values, f"{proposal.get(layer, 0.0):g}"]


def _sentence(proposal: Mapping[str, float], max_drop: float, metric: str) -> str:
    if not proposal:
        return f"No layer can be pruned while {metric} is at most {max_drop:g} worse than dense: raise max_drop."
    return (
        f"Proposed: how sparse each layer can be, pruned alone and not retrained, with {metric} at most {max_drop:g}"
        " worse than dense. Pruned together, the losses add up until fine-tuning makes up for them."
    )
