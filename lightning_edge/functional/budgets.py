"""How many weights of each layer go: budgets of the layers, and floors under a global selection."""

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from torch import Tensor

from lightning_edge.functional.pruning import pruned_count, smallest_masks


def erdos_renyi_kernel(shapes: Sequence[tuple[int, ...]], *, sparsity: float) -> list[int]:
    """Return how many weights of each layer go, so that small layers stay denser than large ones.

    Evci et al. 2020 (arXiv:1911.11134), section 3 (1), Erdos-Renyi-Kernel: the density of a layer is proportional to
    sum(dims) / prod(dims) of its weight, kernel included. Layers whose density would pass 1 stay dense, and the others
    share what is left. The shares are rounded by largest remainders, ties by index, in exact arithmetic.

    Args:
        shapes: Shape of each weight, every dimension at least 1.
        sparsity: Fraction of all weights that go, in [0, 1].

    Returns:
        One count per layer, at most its size; together exactly :func:`pruned_count` of the total size.

    Raises:
        ValueError: If ``sparsity`` is out of range, or a shape is empty or has an empty dimension.

    >>> erdos_renyi_kernel([(300, 784), (100, 300), (10, 100)], sparsity=0.9)
    [216486, 23094, 0]
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], the fraction of zeros, got {sparsity}")
    for shape in shapes:
        if not shape or min(shape) < 1:
            raise ValueError(f"shapes must have dimensions of at least 1, got {tuple(shape)}")
    sizes = [math.prod(shape) for shape in shapes]
    shares = [sum(shape) for shape in shapes]  # what a layer keeps is proportional to this: density times size
    count = pruned_count(sum(sizes), sparsity)
    kept = sum(sizes) - count
    sparse = list(range(len(sizes)))
    quotas = [Fraction(0) for _ in sizes]
    while sparse:
        unit = Fraction(kept, sum(shares[i] for i in sparse))
        full = {i for i in sparse if unit * shares[i] > sizes[i]}
        if not full:
            for i in sparse:
                quotas[i] = sizes[i] - unit * shares[i]
            break
        kept -= sum(sizes[i] for i in full)
        sparse = [i for i in sparse if i not in full]
    return _round_to_sum(quotas, count)


def global_masks(
    scores: Sequence[Tensor], *, count: int, min_kept: Sequence[int], absolute: bool = False
) -> list[Tensor]:
    """Return one mask per tensor, False at the ``count`` smallest scores of all, while each keeps its floor.

    A selection over all layers can empty one of them, which cuts the network in two. Layers that would fall below
    their floor keep exactly that many, their largest scores, and the others give more, until no layer is below. That
    is what taking the scores one by one in rising order gives, passing over those of layers at their floor.

    Args:
        scores: Tensors of any shapes; compared as float32, ties by index.
        count: How many weights go.
        min_kept: How many weights each tensor keeps at least.
        absolute: Compare absolute values.

    Returns:
        Boolean tensors of the same shapes, True = kept; exactly ``count`` elements in all are False.

    Raises:
        ValueError: If a floor is not in [0, size], if the floors leave less than ``count``, or a score is not finite.

    >>> import torch
    >>> global_masks([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], count=2, min_kept=[1, 1])
    [tensor([False,  True]), tensor([False,  True])]
    """
    sizes = [score.numel() for score in scores]
    if len(min_kept) != len(scores):
        raise ValueError(f"min_kept must have one number for each of the {len(scores)} tensors, got {len(min_kept)}")
    for index, (floor, size) in enumerate(zip(min_kept, sizes, strict=True)):
        if not 0 <= floor <= size:
            raise ValueError(f"min_kept must lie in [0, {size}] for tensor {index}, got {floor}")
    largest = sum(sizes) - sum(min_kept)
    if not 0 <= count <= largest:
        raise ValueError(
            f"count must lie in [0, {largest}], got {count}: min_kept holds {sum(min_kept)} of {sum(sizes)} weights"
        )
    masks: dict[int, Tensor] = {}
    free = list(range(len(scores)))
    while True:
        selected = smallest_masks([scores[i] for i in free], count=count, absolute=absolute)
        below = {i for i, mask in zip(free, selected, strict=True) if int(mask.count_nonzero()) < min_kept[i]}
        if not below:
            masks.update(zip(free, selected, strict=True))
            return [masks[i] for i in range(len(scores))]
        for i in below:
            masks[i] = smallest_masks([scores[i]], count=sizes[i] - min_kept[i], absolute=absolute)[0]
            count -= sizes[i] - min_kept[i]
        free = [i for i in free if i not in below]


def kept_floor(size: int, min_kept: int | float) -> int:
    """Return how many of ``size`` weights are kept at least.

    Args:
        size: Number of weights.
        min_kept: An int is a number of weights (all of them, if there are fewer); a float in [0, 1) is a fraction,
            rounded up, taken in decimal as in :func:`pruned_count`.

    Raises:
        ValueError: If ``min_kept`` is neither.

    >>> kept_floor(10, 0.25), kept_floor(10, 4), kept_floor(2, 4)
    (3, 4, 2)
    """
    if isinstance(min_kept, float) and 0.0 <= min_kept < 1.0:
        return math.ceil(Decimal(repr(float(min_kept))) * size)
    if isinstance(min_kept, int) and not isinstance(min_kept, bool) and min_kept >= 0:
        return min(size, min_kept)
    raise ValueError(f"min_kept must be a number of weights or a fraction in [0, 1), got {min_kept!r}")


def _round_to_sum(quotas: Sequence[Fraction], total: int) -> list[int]:
    """Round down, then up where the remainders are largest, so that the sum is ``total``."""
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
