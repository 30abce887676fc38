"""Numbers as the table, the Markdown and the page show them."""

from lightning_edge.export.verification import Verification
from lightning_edge.report.measure import Score
from lightning_edge.report.summary import ReportRow

# What is measured, and below it what exactly.
COLUMNS = (
    ("model", ""),
    ("error", "wrong / all"),
    ("bytes", "on disk"),
    ("ratio", ""),
    ("latency, ms", "p50 / p95"),
    ("runtime", "x threads"),
    ("MACs", "(non-zero)"),
    ("energy", "dense"),
    ("energy", "zero-skip"),
)


def cells(row: ReportRow) -> tuple[str, ...]:
    """Return the texts of a row, one for each of ``COLUMNS``."""
    return (
        row.name,
        error_text(row.error),
        f"{row.size_bytes:,}",
        f"{row.ratio:.1f}x",
        f"{row.latency.p50_ms:.3f} / {row.latency.p95_ms:.3f}",
        f"{row.runtime} x{row.latency.threads}",
        f"{count_text(row.macs)} ({count_text(row.effective_macs)})",
        energy_text(row.energy.joules),
        energy_text(row.zero_skipping_energy.joules),
    )


def error_text(error: Score) -> str:
    """Return the wrong and all inputs, and the percentage.

    >>> error_text(Score(3, 600))
    '3/600 0.50 %'
    """
    return f"{error.wrong}/{error.total} {error.error_percent:.2f} %"


def count_text(count: int) -> str:
    """Return a count with three digits that mean something.

    >>> count_text(768128), count_text(2293000)
    ('768 k', '2.29 M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return str(count)


def energy_text(joules: float) -> str:
    """Return an energy in the unit that suits it.

    >>> energy_text(3.1e-5)
    '31.0 µJ'
    """
    for unit, size in (("mJ", 1e-3), ("µJ", 1e-6)):
        if joules >= size:
            return f"{joules / size:.1f} {unit}"
    return f"{joules * 1e9:.1f} nJ"


def agreement_text(verified: Verification | None) -> str:
    """Return how far a file agrees with the trained network.

    >>> agreement_text(Verification(180, 180, 1e-6))
    '180/180 labels equal, largest difference 1e-06'
    """
    if verified is None:
        return "not checked"
    return f"{verified.agreeing}/{verified.rows} labels equal, largest difference {verified.largest_difference:.2g}"
