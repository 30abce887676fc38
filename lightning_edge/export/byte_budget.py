"""Spend a budget of bytes on shared weights: one rate for all layers, found on the packed file."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_edge.artifact.tensors import encode_tensor
from lightning_edge.export import export
from lightning_edge.functional.sharing import Init
from lightning_edge.surgery.shared_state import codebook_of
from lightning_edge.surgery.sharing import Clusters, ShareReport, resolve_clusters, select_shared, share_weights_

_FLOAT32 = 1  # ONNX's number of the type
_LEAST_RATE, _LARGEST_RATE, _STEP = 0.002, 200.0, 4.0
_TRIALS, _NEAR = 8, 0.001
_FILES, _CLOSE, _CLOSE_BYTES = 5, 0.004, 24  # nearer to the budget, another file would buy next to nothing


def share_weights_within_(  # noqa: PLR0913 - every option once, by keyword
    module: nn.Module,
    *,
    max_bytes: int,
    example_inputs: tuple[Tensor, ...],
    clusters: Clusters = 64,
    init: Init = "linear",
    channel_scale: bool = False,
    group_channels: int | None = None,
    importance: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> tuple[ShareReport, float]:
    """Share weights as finely as a ``.edge`` file of at most ``max_bytes`` allows; return the report and the rate.

    The rate of :func:`~lightning_edge.surgery.sharing.share_weights_` is found on files as ``export`` writes them. Its
    other options are explained there.

    Args:
        module: The network; its selected weights are changed in place.
        max_bytes: Largest file of the whole network.
        example_inputs: Positional inputs, batch first.
        clusters: Most shared values of a layer, or a mapping from patterns to them; the rate leaves fewer.
        init: Start of the k-means.
        channel_scale: A weight is scale of its output channel x shared value.
        group_channels: A codebook for every so many output channels.
        importance: Squared gradients of the loss, by weight name.
        include: Layers to share.
        exclude: Layers to leave alone.
        seed: Of the draws of ``init="random"`` and ``"kmeans++"``, the same at every rate.

    Raises:
        ValueError: If an argument is out of its range, or the budget out of reach: the weights are then as they were.

    >>> layer = nn.Linear(256, 64)
    >>> report, rate = share_weights_within_(layer, max_bytes=9000, example_inputs=(torch.zeros(2, 256),))
    >>> file_bytes(layer, (torch.zeros(2, 256),)) <= 9000
    True
    """
    check_max_bytes(max_bytes)
    selected = select_shared(module, resolve_clusters(clusters, None), include=include, exclude=exclude)
    weights = {name: weight.detach() for name, (weight, _) in selected.items()}
    originals = {name: weight.clone() for name, weight in weights.items()}

    def restore() -> None:
        for name, weight in originals.items():
            weights[name].copy_(weight)

    def share(rate: float) -> ShareReport:
        restore()
        return share_weights_(
            module,
            clusters=clusters,
            init=init,
            channel_scale=channel_scale,
            rate=rate,
            group_channels=group_channels,
            importance=importance,
            include=include,
            exclude=exclude,
            generator=torch.Generator().manual_seed(seed),
        )

    try:
        return share_within(
            max_bytes,
            share=share,
            record_bytes=lambda report: record_bytes(weights, report),
            file_bytes=lambda: file_bytes(module, example_inputs),
        )
    except ValueError:
        restore()
        raise


def check_max_bytes(max_bytes: int) -> None:
    """Raise a ValueError unless a budget is a number of bytes.

    >>> check_max_bytes(5000)
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a whole number >= 1, got {max_bytes!r}")


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
    if min(sizes.values()) > target:
        # At rates that leave one value in a row its scale is not found again, and files grow: look at every rate.
        for tried in [tried for tried in records if tried not in sizes]:
            share(tried)
            sizes[tried] = file_bytes()
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
        2 * tensor.numel() for tensor in others if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
    )


def file_bytes(network: nn.Module, example_inputs: tuple[Tensor, ...]) -> int:
    """Return the size of the network's ``.edge`` file, which is written and removed again."""
    with tempfile.TemporaryDirectory() as folder:
        return export(network, Path(folder) / "network.edge", example_inputs=example_inputs).stat().st_size
