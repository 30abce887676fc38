"""What int8 costs in each layer, as a table and an override that can be pasted."""

import shlex

from lightning_edge.report.write import markdown_table
from lightning_edge.surgery.quantization_sensitivity import KeptLayers, QuantizationSensitivityReport


def quantization_sensitivity_text(
    report: QuantizationSensitivityReport, chosen: KeptLayers, *, max_drop: float, metric: str = "metric"
) -> str:
    """Return the metric with each layer alone in int8, in network order, and the layers to keep in float, as Markdown.

    Args:
        report: What was measured.
        chosen: The layers to keep, from :func:`~lightning_edge.surgery.quantization_sensitivity.layers_to_keep`.
        max_drop: What was allowed for them.
        metric: What was measured.

    >>> from lightning_edge.surgery.quantization_sensitivity import QuantizationSensitivityRow
    >>> rows = (QuantizationSensitivityRow("fc", 9, 0.25),)
    >>> report = QuantizationSensitivityReport(rows, dense=0.125, quantized=0.25)
    >>> print(quantization_sensitivity_text(report, KeptLayers((), 0.25), max_drop=0.5).splitlines()[4])
    | fc | 9 | 0.2500 | int8 |
    """
    rows = [
        [row.layer or "network", f"{row.size:,}", f"{row.value:#.4g}", "float" if row.layer in chosen.keep else "int8"]
        for row in report.rows
    ]
    parts = [
        f"{metric} with one layer in int8; dense {report.dense:#.4g}, all in int8 {report.quantized:#.4g}",
        markdown_table(["layer", "weights", "alone", "chosen"], rows),
        f"With {len(chosen.keep)} layers in float, {metric} is {chosen.value:#.4g}, which {max_drop:g} allows:",
        "    " + shlex.quote(f"callbacks.calibration.keep=[{','.join(chosen.keep)}]"),
    ]
    return "\n\n".join(parts) + "\n"
