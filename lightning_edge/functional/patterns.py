"""Which shapes the zeros of a weight may form: any, N of every M along the inputs, or whole blocks."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_edge.functional.floats import sortable_bits
from lightning_edge.functional.pruning import smallest_masks


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go."""


@dataclass(frozen=True)
class NofM:
    """At most ``kept`` of every ``group`` consecutive weights along the input dimension are not zero.

    The input dimension is dimension 1 (``prune_`` turns the weights of transposed convolutions around first); in a
    convolution the rule holds at each kernel position. A last group that is
    shorter keeps ``min(kept, its size)``. 2:4 is what sparse tensor cores of GPUs run (Mishra et al. 2021,
    arXiv:2104.08378).

    Args:
        kept: N, how many weights of a group stay, at least 1.
        group: M, size of a group, above ``kept``.

    Raises:
        ValueError: Unless 1 <= kept < group.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group:
            raise ValueError(
                f"pattern N:M must keep at least 1 and fewer than M of M weights, got {self.kept}:{self.group}"
            )


@dataclass(frozen=True)
class Blocks:
    """Weights go in whole blocks of ``rows`` outputs (dimension 0) by ``columns`` inputs (dimension 1).

    In a convolution each kernel position has blocks of its own. Blocks at the edges may be smaller.

    Args:
        rows: Outputs in a block, at least 1.
        columns: Inputs in a block, at least 1.

    Raises:
        ValueError: If one of them is below 1.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"pattern RxC must have rows and columns of at least 1, got {self.rows}x{self.columns}")


Pattern = Unstructured | NofM | Blocks


def find_pattern(text: str) -> Pattern:
    """Return the pattern that ``text`` names: ``"unstructured"``, N:M as ``"2:4"``, or blocks as ``"1x4"``.

    Raises:
        ValueError: If ``text`` has none of these forms, or its numbers are out of range.

    >>> find_pattern("2:4"), find_pattern("1x4")
    (NofM(kept=2, group=4), Blocks(rows=1, columns=4))
    """
    if text == "unstructured":
        return Unstructured()
    form = re.fullmatch(r"(\d+)([:x])(\d+)", str(text))
    if form is None:
        raise ValueError(
            f"pattern must be 'unstructured', N:M such as '2:4' or blocks such as '1x4', got {text!r}; in a"
            " YAML file write the quotes, without them 2:4 is read as 124"
        )
    first, second = int(form[1]), int(form[3])
    return NofM(first, second) if form[2] == ":" else Blocks(first, second)


def prunable(shape: tuple[int, ...], pattern: Pattern) -> int:
    """Return the largest number of weights that a tensor of ``shape`` (outputs, inputs, *kernel) can lose.

    Raises:
        ValueError: If the pattern needs two dimensions and ``shape`` has fewer.

    >>> prunable((8, 6, 3, 3), NofM(kept=2, group=4))
    144
    """
    if not isinstance(pattern, NofM):
        return math.prod(shape)
    _check_dimensions(shape, pattern)
    groups, rest = divmod(shape[1], pattern.group)
    return shape[0] * math.prod(shape[2:]) * (groups * (pattern.group - pattern.kept) + max(0, rest - pattern.kept))


def n_of_m_candidates(score: Tensor, pattern: NofM) -> Tensor:
    """Return True where a weight may go: it is not among the ``pattern.kept`` largest scores of its group.

    Args:
        score: Shape (outputs, inputs, *kernel); compared as float32. Of equal scores the earlier may go.
        pattern: N and M.

    Returns:
        Boolean tensor of the same shape with :func:`prunable` elements True.

    Raises:
        ValueError: If ``score`` has fewer than two dimensions or is not finite.

    >>> n_of_m_candidates(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), NofM(kept=2, group=4))
    tensor([[ True, False,  True, False]])
    """
    _check_dimensions(tuple(score.shape), pattern)
    keys = sortable_bits(score, what="scores").view(score.shape).movedim(1, -1)
    inputs = score.shape[1]
    # The padding ranks below every score, so that a short group fills its places to go with padding first.
    keys = F.pad(keys, (0, -inputs % pattern.group), value=torch.iinfo(keys.dtype).min)
    groups = keys.view(*keys.shape[:-1], keys.shape[-1] // pattern.group, pattern.group)
    going = groups.argsort(dim=-1, stable=True)[..., : pattern.group - pattern.kept]
    candidates = torch.zeros(groups.shape, dtype=torch.bool, device=score.device).scatter_(-1, going, True)
    return candidates.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()


def pattern_masks(scores: Sequence[Tensor], *, count: int, pattern: Pattern) -> list[Tensor]:
    """Return one mask per tensor, False at the ``count`` smallest scores of all tensors that ``pattern`` lets go.

    N:M: the smallest among :func:`n_of_m_candidates`, so that masks grow inside the final pattern from one count to
    the next and fill it at the largest count. Blocks: those of smallest mean score, in rising order, as long as their
    weights together are at most ``count``. Ties go by index: of tensors, then of elements or blocks.

    Args:
        scores: Tensors of shape (outputs, inputs, *kernel), compared as float32; of any shape if unstructured.
        count: How many weights go, in [0, the sum of :func:`prunable`].
        pattern: Which weights go together.

    Returns:
        Boolean tensors of the same shapes, True = kept. Exactly ``count`` elements in all are False; with blocks, at
        most that many.

    Raises:
        ValueError: If ``count`` is out of range, a tensor has too few dimensions, or a score is not finite.

    >>> pattern_masks([torch.tensor([[1.0, 9.0, 2.0, 3.0]])], count=2, pattern=Blocks(1, 2))
    [tensor([[ True,  True, False, False]])]
    """
    for score in scores:
        _check_dimensions(tuple(score.shape), pattern)
    largest = sum(prunable(tuple(score.shape), pattern) for score in scores)
    if not 0 <= count <= largest:
        raise ValueError(f"count must lie in [0, {largest}], what {pattern} lets go, got {count}")
    if isinstance(pattern, NofM):
        return _n_of_m_masks(scores, count, pattern)
    if isinstance(pattern, Blocks):
        return _block_masks(scores, count, pattern)
    return smallest_masks(scores, count=count)


def _n_of_m_masks(scores: Sequence[Tensor], count: int, pattern: NofM) -> list[Tensor]:
    candidates = [n_of_m_candidates(score, pattern) for score in scores]
    selected = smallest_masks([s[c] for s, c in zip(scores, candidates, strict=True)], count=count)
    return [
        candidate.logical_not().masked_scatter_(candidate, kept)
        for candidate, kept in zip(candidates, selected, strict=True)
    ]


def _block_masks(scores: Sequence[Tensor], count: int, pattern: Blocks) -> list[Tensor]:
    if not scores:
        return []
    device = scores[0].device
    means, sizes = zip(*(_block_means(score, pattern) for score in scores), strict=True)
    order = torch.cat([sortable_bits(mean, what="scores").to(device) for mean in means]).argsort(stable=True)
    behind = torch.cat([size.flatten().to(device) for size in sizes])[order].cumsum(0)
    kept = torch.ones(len(order), dtype=torch.bool, device=device)
    kept[order[: int(torch.searchsorted(behind, count, right=True))]] = False
    return [
        _spread(part.view(mean.shape).to(score.device), score, pattern)
        for part, mean, score in zip(torch.split(kept, [mean.numel() for mean in means]), means, scores, strict=True)
    ]


def _block_means(score: Tensor, pattern: Blocks) -> tuple[Tensor, Tensor]:
    """Return the mean score and the size of each block, both of shape (block rows, block columns, *kernel)."""
    rows, columns = score.shape[:2]
    missing = (-rows % pattern.rows, -columns % pattern.columns)
    kernel = score.shape[2:]
    padded = F.pad(score.detach().float(), (*(0, 0) * len(kernel), 0, missing[1], 0, missing[0]))
    heights = _extents(rows, pattern.rows, score.device)
    widths = _extents(columns, pattern.columns, score.device)
    sums = padded.reshape(len(heights), pattern.rows, len(widths), pattern.columns, *kernel).sum(dim=(1, 3))
    sizes = torch.outer(heights, widths).view(len(heights), len(widths), *(1 for _ in kernel)).expand(sums.shape)
    return sums / sizes, sizes


def _extents(size: int, block: int, device: torch.device) -> Tensor:
    """Return the extent of each block along a dimension; the last may be shorter."""
    extents = torch.full((-(-size // block),), block, device=device)
    extents[-1:] -= -size % block
    return extents


def _spread(blocks: Tensor, score: Tensor, pattern: Blocks) -> Tensor:
    """Return the value of each weight's block, in the shape of ``score``."""
    weights = blocks.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.columns, 1)
    return weights[: score.shape[0], : score.shape[1]].contiguous()


def _check_dimensions(shape: tuple[int, ...], pattern: Pattern) -> None:
    if len(shape) < 2 and not isinstance(pattern, Unstructured):
        raise ValueError(f"scores must have dimensions (outputs, inputs, *kernel) for {pattern}, got shape {shape}")
