"""The report as files: JSON for programs, Markdown for a repository, one HTML page for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_edge.report import plots
from lightning_edge.report.footprint import LayerFootprint
from lightning_edge.report.summary import Report, ReportRow
from lightning_edge.report.text import COLUMNS, agreement_text, cells

_LAYER_COLUMNS = ("layer", "kind", "parameters", "fp32 bytes", "kept weights", "kept", "distinct values", "MACs")


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` and return their paths.

    The page is one file: its plots are inside, and it loads nothing. Each file appears whole or not at all.

    Args:
        report: What to write.
        folder: Created when missing.
    """
    texts = {"report.json": to_json(report), "report.md": to_markdown(report), "report.html": to_html(report)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    json_path, markdown_path, html_path = (write_text(Path(folder) / name, text) for name, text in texts.items())
    return json_path, markdown_path, html_path


def to_json(report: Report) -> str:
    """Return all fields of the report and what is derived from them."""
    document: dict[str, Any] = {
        "title": report.title,
        "command": report.command,
        "environment": dict(report.environment),
        "baseline": _row_fields(report.baseline),
        "artifacts": [_row_fields(row) for row in report.artifacts],
        "layers": asdict(report.layers) | {"weight_bytes": report.layers.weight_bytes},
        "history": [asdict(record) for record in report.history],
        "caption": list(report.caption),
        "notes": list(report.notes),
    }
    return json.dumps(document, indent=2) + "\n"


def to_markdown(report: Report) -> str:
    """Return the report's tables as Markdown."""
    parts = [
        f"# {report.title}",
        f"`{report.command}`",
        markdown_table([" ".join(column).strip() for column in COLUMNS], [cells(row) for row in report.rows]),
        "\n".join(f"- {line}" for line in report.caption),
        "## Verification",
        "\n".join(f"- {row.name}: {agreement_text(row.verified)}" for row in report.artifacts),
        "## Layers",
        markdown_table(_LAYER_COLUMNS, [_layer_cells(layer) for layer in report.layers.layers]),
        *(["## Notes", "\n".join(f"- {note}" for note in report.notes)] if report.notes else []),
        "## Environment",
        "\n".join(f"- {name}: {value}" for name, value in report.environment.items()),
    ]
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    """Return the report as one page, plots inside."""
    pictures = [
        ("Bytes on disk", plots.bytes_plot(report.rows)),
        ("Error against bytes, with 95 % intervals", plots.error_plot(report.rows)),
        ("Weights kept in each layer", plots.kept_plot(report.layers.layers)),
    ]
    if report.history:
        pictures.append(("Training", plots.curves_plot(report.history)))
    templates = Environment(
        loader=PackageLoader("lightning_edge.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return templates.get_template("report.html").render(
        report=report,
        columns=COLUMNS,
        rows=[cells(row) for row in report.rows],
        layer_columns=_LAYER_COLUMNS,
        layers=[_layer_cells(layer) for layer in report.layers.layers],
        pictures=pictures,
        agreement_text=agreement_text,
        smallest=min(report.artifacts, key=lambda row: row.size_bytes, default=report.baseline),
    )


def _row_fields(row: ReportRow) -> dict[str, Any]:
    low, high = row.error.interval_percent
    fields = asdict(row)
    fields["error"] |= {"error_percent": row.error.error_percent, "interval_percent": [low, high]}
    fields["energy"]["joules"] = row.energy.joules
    fields["zero_skipping_energy"]["joules"] = row.zero_skipping_energy.joules
    return fields | {"runtime": row.runtime}


def _layer_cells(layer: LayerFootprint) -> tuple[str, ...]:
    weighted = layer.weights > 0
    return (
        layer.name or "network",
        layer.kind,
        f"{layer.parameters:,}",
        f"{layer.weight_bytes:,}",
        f"{layer.nonzero:,}" if weighted else "",
        f"{100 * layer.kept:.1f} %" if weighted else "",
        f"{layer.distinct:,}" if weighted else "",
        f"{layer.macs:,}",
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of these columns as Markdown.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_text(path: Path, text: str) -> Path:
    """Write to a temporary name and rename; return the path."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path
