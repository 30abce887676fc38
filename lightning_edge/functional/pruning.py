"""Which weights stay: exact masks from scores, without a sort and without a second copy of all scores."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

import torch
from torch import Tensor

from lightning_edge.functional.floats import sortable_bits

_HALF = 1 << 16
_CHUNK = 1 << 16  # keys of so many scores at a time stay in the processor's cache


def pruned_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights are zero at ``sparsity``: the largest count that is not above it.

    The product is taken in decimal, so that 0.29 of 100 is 29 although the nearest double to 0.29 lies below it.

    >>> pruned_count(100, 0.29)
    29
    """
    return int(Decimal(repr(float(sparsity))) * size)


def smallest_masks(scores: Sequence[Tensor], *, count: int, absolute: bool = False) -> list[Tensor]:
    """Return one mask per tensor, False at the ``count`` smallest scores of all tensors together.

    The threshold is the exact ``count``-th smallest score, found by a radix histogram over the order-preserving
    integer form of float32: one pass over the upper 16 bits, one over the lower 16 bits of the bucket that holds it.
    Memory beyond the masks is that of a small part of the scores at a time. Ties at the threshold are broken by index:
    the first in the order of the tensors and of their elements go.

    Args:
        scores: Tensors of any shapes; compared as float32.
        count: How many scores to select, in [0, total number of scores].
        absolute: Compare absolute values: weights are their own scores, and need no copy.

    Returns:
        Boolean tensors of the same shapes; exactly ``count`` elements in all are False.

    Raises:
        ValueError: If ``count`` is out of range, or a score is infinite or not a number.

    >>> smallest_masks([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], count=2)
    [tensor([ True, False]), tensor([False])]
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= count <= total:
        raise ValueError(f"count must lie in [0, {total}], got {count}")
    if count == 0:
        return [torch.ones(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    keys_of = partial(_keys_of, absolute=absolute)
    upper, below = _bucket_of(scores, count, digit=lambda part: (keys_of(part) >> 16) + _HALF // 2)
    prefix = upper - _HALF // 2

    def lower_digits(part: Tensor) -> Tensor:
        keys = keys_of(part)
        return keys[keys >> 16 == prefix] & (_HALF - 1)

    lower, below_in_bucket = _bucket_of(scores, count - below, digit=lower_digits)
    threshold = (prefix << 16) | lower
    ties = count - below - below_in_bucket
    masks = []
    for score in scores:
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for part, kept in zip(_chunks(score), _chunks(mask), strict=True):
            keys = keys_of(part)
            torch.gt(keys, threshold, out=kept)
            equal = (keys == threshold).nonzero().flatten()
            kept[equal[ties:]] = True
            ties -= min(ties, len(equal))
        masks.append(mask)
    return masks


def _chunks(score: Tensor) -> Sequence[Tensor]:
    """Return the elements in order, as flat views of a part each (of a copy, if the tensor is not contiguous)."""
    return torch.split(score.detach().flatten(), _CHUNK) if score.numel() else ()


def _keys_of(part: Tensor, *, absolute: bool) -> Tensor:
    return sortable_bits(part.abs() if absolute else part, what="scores")


def _bucket_of(scores: Sequence[Tensor], count: int, *, digit: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Return the bucket that holds the ``count``-th smallest digit, and how many digits lie in smaller buckets."""
    histogram = torch.zeros(_HALF, dtype=torch.int64)
    for score in scores:
        for part in _chunks(score):
            histogram += torch.bincount(digit(part), minlength=_HALF).cpu()
    cumulative = histogram.cumsum(0)
    bucket = int(torch.searchsorted(cumulative, count))
    return bucket, int(cumulative[bucket] - histogram[bucket])
