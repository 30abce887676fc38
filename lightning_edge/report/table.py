"""The table at the end of a run."""

from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_edge.report.summary import Report
from lightning_edge.report.text import COLUMNS, cells

_MIN_WIDTH = 120


def print_table(report: Report, *, file: IO[str] | None = None) -> None:
    """Print one line per model: error, bytes, latency, multiply-accumulates and energy, and how they were obtained.

    Into a pipe or a file it is as wide as it needs to be; in a terminal that is too narrow, cells continue on the next
    line. Nothing is cut off.

    Args:
        report: What to print.
        file: Where to; standard output by default.
    """
    console = Console(file=file, highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=report.title,
        title_justify="left",
        title_style="bold",
        collapse_padding=True,
        pad_edge=False,
    )
    for name, detail in COLUMNS:
        left = name in ("model", "runtime")
        table.add_column(f"{name}\n{detail}", justify="left" if left else "right", overflow="fold")
    for row in report.rows:
        table.add_row(*cells(row), style="dim" if row is report.baseline else None)
    if not console.is_terminal:
        unbounded = console.options.update(max_width=10_000)
        console.width = max(_MIN_WIDTH, console.measure(table, options=unbounded).maximum)
    console.print(table)
    for line in report.caption:
        console.print(line, style="dim", soft_wrap=not console.is_terminal)
