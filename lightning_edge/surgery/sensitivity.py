"""How far each layer can be pruned on its own before the network's metric suffers."""

import csv
import glob
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lightning_edge.surgery.pruning import prune_
from lightning_edge.surgery.selection import select_weights

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_COLUMNS = ["layer", "size", "sparsity", "value"]
_FIRST_LINE = re.compile(r"# network ([0-9a-f]{64}), dense value (\S+)")
_ROUNDING = 1e-5  # relative, of the difference of two metrics near 1 in float32
_STEPS = 1000  # proposals end after three decimals


@dataclass(frozen=True)
class SensitivityRow:
    """The network's metric while one layer, and it alone, is pruned.

    Attributes:
        layer: Qualified name; "" if the network is itself the layer.
        size: Weights of the layer.
        sparsity: Fraction of them that is zero, in (0, 1).
        value: The metric.
    """

    layer: str
    size: int
    sparsity: float
    value: float


@dataclass(frozen=True)
class SensitivityReport:
    """What :func:`sensitivity` measured.

    Attributes:
        rows: One for each layer and sparsity, layers in module order, sparsities ascending.
        dense: The metric of the network as it is.
        network: SHA-256 of all its weights and buffers, hexadecimal.
        higher_is_better: Whether the metric is one that grows with quality.
    """

    rows: tuple[SensitivityRow, ...]
    dense: float
    network: str
    higher_is_better: bool = False

    @property
    def curves(self) -> dict[str, tuple[SensitivityRow, ...]]:
        """The rows of each layer, by its name."""
        layers = dict.fromkeys(row.layer for row in self.rows)
        return {layer: tuple(row for row in self.rows if row.layer == layer) for layer in layers}

    def drop(self, row: SensitivityRow) -> float:
        """Return how much worse than dense the metric is, in its own unit; infinite where it is not a number."""
        drop = self.dense - row.value if self.higher_is_better else row.value - self.dense
        return math.inf if math.isnan(drop) else drop

    def propose(self, max_drop: float) -> dict[str, float]:
        """Return for each layer how sparse it can be while the metric is at most ``max_drop`` worse than dense.

        That is the largest measured sparsity that keeps within it (0.0, the dense network, is one of them), and from
        there on to the next one, which does not, a straight line: rounded down to three decimals. A layer that gets 0.0
        is left out. Every layer was measured alone: pruned together, the losses add up until fine-tuning makes up for
        them.

        Args:
            max_drop: In the unit of the metric, at least 0.

        Returns:
            Name of the layer to sparsity, in module order; what ``sparsity=`` of ``WeightPruning`` takes.

        Raises:
            ValueError: If ``max_drop`` is negative.

        >>> rows = tuple(SensitivityRow("fc", 10, *point) for point in [(0.5, 0.1), (0.9, 0.5)])
        >>> SensitivityReport(rows, dense=0.1, network="").propose(max_drop=0.1)
        {'fc': 0.6}
        """
        check_max_drop(max_drop)
        proposal = {}
        for layer, curve in self.curves.items():
            sparsities = [0.0, *(row.sparsity for row in curve)]
            drops = [0.0, *map(self.drop, curve)]
            last = max(n for n, drop in enumerate(drops) if drop <= max_drop or _equal(drop, max_drop))
            proposal[layer] = sparsities[last]
            if last + 1 < len(drops):
                share = max(0.0, max_drop - drops[last]) / (drops[last + 1] - drops[last])
                between = sparsities[last] + share * (sparsities[last + 1] - sparsities[last])
                proposal[layer] = max(sparsities[last], math.floor(between * _STEPS) / _STEPS)
        return {layer: sparsity for layer, sparsity in proposal.items() if sparsity}

    def write_csv(self, path: str | Path) -> Path:
        """Write the rows, whole or not at all, as :func:`sensitivity` keeps and reads them; return the path."""
        return _write_csv(Path(path), self.network, self.dense, self.rows)


def sensitivity(
    module: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    higher_is_better: bool = False,
    path: str | Path | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Return the metric for every layer and sparsity, each layer pruned alone by magnitude, without retraining.

    This is the scan of Han et al. 2015 (arXiv:1506.02626, figure 6). The dense network is measured first. After every
    measurement the layer has its weights back, bit by bit, also when ``evaluate`` raises.

    Args:
        module: The network; afterwards as it was before.
        evaluate: From ``module`` to the metric, for example the error on the validation data. It should put the network
            into eval mode, and must leave its weights and buffers alone.
        sparsities: Fractions of zeros, each in (0, 1).
        include: Layers to measure, globs over names or class names; the default is every linear and convolution layer.
        exclude: Layers to leave out.
        higher_is_better: Whether the metric grows with quality, as an accuracy does.
        path: A ``.csv`` that gets every row as soon as it is measured. A second call goes on behind the rows that it
            holds; ``evaluate`` has to be the same then. Its first line starts with ``#`` and names the network.
        progress: Show a progress bar.

    Returns:
        The rows, from which :meth:`SensitivityReport.propose` derives a target for every layer.

    Raises:
        ValueError: If an argument is out of its range, a pattern matches no layer, the dense metric is not finite,
            ``evaluate`` changes the network, or ``path`` holds the rows of another network or something else.

    >>> layer = nn.Linear(8, 4)
    >>> report = sensitivity(layer, lambda m: float((m.weight == 0).sum()), sparsities=[0.5], progress=False)
    >>> report.dense, report.rows[0].value
    (0.0, 16.0)
    """
    steps = check_sparsities(sparsities)
    weights = select_weights(module, include=include, exclude=exclude)
    network = _fingerprint(module)
    kept = Path(path) if path is not None else None
    dense, known = _read_csv(kept, network) if kept is not None and kept.exists() else (None, {})
    if dense is None:
        dense = float(evaluate(module))
        _check_dense(dense, unchanged=_fingerprint(module) == network)
        _keep(kept, network, dense, known)
    rows = []
    with _progress_bar(progress) as bar:
        task = bar.add_task("", total=len(weights) * len(steps))
        for name, weight in weights.items():
            layer = name.rpartition(".")[0]
            bar.update(task, description=layer)
            for sparsity in steps:
                if (layer, sparsity) not in known:
                    with _pruned(module, layer, weight, sparsity):
                        value = float(evaluate(module))
                    known[layer, sparsity] = SensitivityRow(layer, weight.numel(), sparsity, value)
                    _keep(kept, network, dense, known)
                rows.append(known[layer, sparsity])
                bar.advance(task)
    return SensitivityReport(tuple(rows), dense, network, higher_is_better)


def check_sparsities(sparsities: Sequence[float]) -> list[float]:
    """Return the sparsities ascending, each once.

    Raises:
        ValueError: If there is none, or one is not in (0, 1).

    >>> check_sparsities([0.9, 0.5, 0.9])
    [0.5, 0.9]
    """
    steps = sorted({float(sparsity) for sparsity in sparsities})
    if not steps or not all(0.0 < sparsity < 1.0 for sparsity in steps):
        raise ValueError(f"sparsities must be one or more fractions of zeros in (0, 1), got {list(sparsities)}")
    return steps


def check_max_drop(max_drop: float) -> float:
    """Return ``max_drop`` if it is an amount by which a metric can get worse.

    Raises:
        ValueError: If it is negative or not a number.

    >>> check_max_drop(0.01)
    0.01
    """
    if not max_drop >= 0.0:
        raise ValueError(f"max_drop must be at least 0, got {max_drop}: how much worse than dense the metric may be")
    return max_drop


@contextmanager
def _pruned(module: nn.Module, layer: str, weight: Tensor, sparsity: float) -> Iterator[None]:
    """Prune one layer for a while."""
    before = weight.detach().clone()
    try:
        prune_(module, sparsity=sparsity, scope="layer", include=[_only(layer)])
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _only(layer: str) -> str:
    """Return the pattern that matches a layer of this name and no other."""
    # A plain word would also choose all layers whose class has that name.
    return f"[{layer[0]}]{layer[1:]}" if layer.isidentifier() else glob.escape(layer)


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):  # a module's own extra state can be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_dense(dense: float, *, unchanged: bool) -> None:
    if not math.isfinite(dense):
        raise ValueError(f"evaluate must return a finite metric for the dense network, got {dense}")
    if not unchanged:
        raise ValueError(
            "evaluate must leave the network as it is, got other weights or buffers after its first call: put the"
            " network into eval mode, or batch norm goes on counting"
        )


def _equal(drop: float, max_drop: float) -> bool:
    return math.isclose(drop, max_drop, rel_tol=_ROUNDING)


def _progress_bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not shown)


def _keep(path: Path | None, network: str, dense: float, known: Mapping[tuple[str, float], SensitivityRow]) -> None:
    """Write what is known so far; of several processes one does."""
    # All of them have read the file before their first evaluation, in which they wait for each other.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if path is not None and not (distributed and torch.distributed.get_rank()):
        _write_csv(path, network, dense, tuple(known.values()))


def _write_csv(path: Path, network: str, dense: float, rows: Sequence[SensitivityRow]) -> Path:
    text = io.StringIO()
    text.write(f"# network {network}, dense value {dense!r}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row.layer, row.size, row.sparsity, row.value] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text.getvalue(), encoding="utf-8")
    unfinished.replace(path)
    return path


def _read_csv(path: Path, network: str) -> tuple[float, dict[tuple[str, float], SensitivityRow]]:
    """Return the dense metric and the rows by layer and sparsity, if they are those of ``network``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = _FIRST_LINE.fullmatch(lines[0]) if lines else None
    if first is None or lines[1:2] != [",".join(_COLUMNS)]:
        raise ValueError(f"path must be a new file or one that sensitivity wrote, got {path}: choose another name")
    if first[1] != network:
        raise ValueError(
            f"path must hold rows of this network (sha256 {network[:12]}...), got {path} with those of another"
            f" ({first[1][:12]}...): remove the file, or choose another name"
        )
    rows = [_row(fields, path) for fields in csv.DictReader(lines[1:])]
    return float(first[2]), {(row.layer, row.sparsity): row for row in rows}


def _row(fields: Mapping[str, str], path: Path) -> SensitivityRow:
    try:
        return SensitivityRow(fields["layer"], int(fields["size"]), float(fields["sparsity"]), float(fields["value"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"path must hold {', '.join(_COLUMNS)} in every row, got {fields} in {path}") from error
