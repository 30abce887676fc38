"""What a run is judged by, measured on the files that ship: bytes, error, latency, and an estimate of the energy."""

from lightning_edge.report.footprint import Footprint, LayerFootprint, footprint, of_integers
from lightning_edge.report.measure import Measurement, Score, measure_artifacts, score
from lightning_edge.report.summary import EpochRecord, Report, ReportRow, environment, report_row
from lightning_edge.report.table import print_table
from lightning_edge.report.write import write_report

__all__ = [
    "EpochRecord",
    "Footprint",
    "LayerFootprint",
    "Measurement",
    "Report",
    "ReportRow",
    "Score",
    "environment",
    "footprint",
    "measure_artifacts",
    "of_integers",
    "print_table",
    "report_row",
    "score",
    "write_report",
]
