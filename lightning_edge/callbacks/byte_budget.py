"""Spend a budget of bytes on shared weights: one rate for all layers, found on the packed file."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_edge.artifact.tensors import encode_tensor
from lightning_edge.export import export
from lightning_edge.surgery.shared_state import codebook_of
from lightning_edge.surgery.sharing import ShareReport

_FLOAT32 = 1  # ONNX's number of the type
_LEAST_RATE, _LARGEST_RATE, _STEP = 0.002, 200.0, 4.0
_TRIALS, _NEAR = 8, 0.001
_FILES, _CLOSE, _CLOSE_BYTES = 5, 0.004, 24  # nearer to the budget, another file would buy next to nothing


def share_within(
    max_bytes: int,
    *,
    share: Callable[[float], ShareReport],
    record_bytes: Callable[[ShareReport], int],
    file_bytes: Callable[[], int],
    spare: int = 0,
) -> tuple[ShareReport, float]:
    """Share weights at about the smallest rate whose packed file fits, and return the report and the rate.

    The file of the weights shared at no rate shows what all takes that is not shared. The rate is then searched on the
    records of the shared weights alone, which are quicker to make, and checked on a file; a difference corrects the
    next search. Only a file that fits is good enough.

    Args:
        max_bytes: Largest file.
        share: Shares the original weights at a rate.
        record_bytes: About the size of the packed weights just shared.
        file_bytes: Size of the whole file of the weights just shared.
        spare: Bytes of the budget to leave free.

    Raises:
        ValueError: If no rate is enough; names the smallest file that was reached.

    >>> def share(rate): return ShareReport((), {}, {})
    >>> share_within(100, share=share, record_bytes=lambda report: 50, file_bytes=lambda: 90)[1]
    0.0
    """
    target, records = max_bytes - spare, dict[float, int]()
    report, rate = share(0.0), 0.0
    sizes = {rate: file_bytes()}
    if sizes[rate] <= target:
        return report, rate
    while not target - max(_CLOSE * target, _CLOSE_BYTES) <= sizes[rate] <= target and len(sizes) < _FILES:

        def size_at(tried: float, other: int = sizes[rate] - record_bytes(report)) -> int:
            if tried not in records:
                records[tried] = record_bytes(share(tried))
            return records[tried] + other

        rate = _smallest_rate(size_at, target)
        # A file can jump where its records do not: then half way between what was too large and what fitted.
        low = max(tried for tried, size in sizes.items() if size > target)
        high = min((tried for tried, size in sizes.items() if size <= target), default=float("inf"))
        if not low < rate < high and 0.0 < low < high < float("inf"):
            rate = (low * high) ** 0.5
        if rate in sizes:
            break
        report = share(rate)
        sizes[rate] = file_bytes()
    fitting = [tried for tried, size in sizes.items() if size <= target]
    if not fitting:
        smallest = min(sizes.values())
        raise ValueError(
            f"max_bytes must be at least {smallest + spare:,}, got {max_bytes:,}: the smallest file that sharing"
            f" reached has {smallest:,} bytes, and training may add {spare:,}; allow more, prune weights or channels"
            " first, or share more of the layers"
        )
    # Once more: the last one tried need not be the best that fitted.
    return share(min(fitting)), min(fitting)


def _smallest_rate(size_at: Callable[[float], int], target: int) -> float:
    """Return about the smallest rate that fits; the largest of all if none does."""
    high = _LEAST_RATE
    while size_at(high) > target:
        high *= _STEP
        if high > _LARGEST_RATE:
            return high
    low = high / _STEP
    for _ in range(_TRIALS):
        above, below = size_at(low) - target, target - size_at(high)
        if above <= 0 or below <= _NEAR * target:
            break
        # The size falls about evenly with the logarithm of the rate.
        middle = low * (high / low) ** min(max(above / (above + below), 0.1), 0.9)
        low, high = (low, middle) if size_at(middle) <= target else (middle, high)
    return high


def record_bytes(weights: Mapping[str, Tensor], report: ShareReport) -> int:
    """Return about the packed size of shared weights: values in float16, scales elsewhere, no adaptive contexts."""
    size = 0
    for name, codes in report.codes.items():
        values = codebook_of(weights[name], codes, report.scales.get(name)).half().float()
        size += len(encode_tensor(values[codes].cpu().numpy(), _FLOAT32, adaptive=False)[0])
    return size


def constant_bytes(network: nn.Module, shared: Mapping[str, Tensor]) -> int:
    """Return what the constant tensors of a network, norms and biases to begin with, may take once they are trained."""
    others = (tensor for name, tensor in network.state_dict().items() if name not in shared)
    return sum(
        2 * tensor.numel() for tensor in others if tensor.numel() > 1 and bool((tensor == tensor.view(-1)[0]).all())
    )


def file_bytes(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> int:
    """Return the size of the network's ``.edge`` file, which is written and removed again."""
    with tempfile.TemporaryDirectory() as folder:
        return export(network, Path(folder) / "network.edge", example_inputs=example_inputs).stat().st_size
