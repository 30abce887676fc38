"""Codes and shared values of one weight tensor: find them, assign them anew, project on them, share gradients.

A *code* says for every single weight which shared value it takes: 0 is the value zero, 1 and up are the others. All
that belongs to one code is equal (with ``channel_scale``: equal up to the scale of its output channel), whatever the
codebook is like: one for the tensor, one for each group of rows, or one of vectors.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_edge.functional.rate import add_by, assign_1d, chunks, code_lengths
from lightning_edge.functional.sharing import cluster_means
from lightning_edge.surgery.codebooks import Codebooks

Gradient = Literal["mean", "sum"]
_NEARLY_ZERO = 1e-30
_PART = 1 << 16  # numbers that are worked on at a time, in whole rows


@torch.no_grad()
def project_(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    *,
    importance: Tensor | None = None,
    target: Tensor | None = None,
) -> None:
    """Set every weight to the mean of its cluster, and those of code 0 to zero.

    With scales a weight is the float32 product of its row's scale and its shared value. Least squares, in turn: the
    values given the scales, the scales given the values.

    Args:
        weight: Changed in place.
        codes: Of its shape.
        scales: Of its rows, changed in place.
        importance: Weights of the squares.
        target: What the means are taken of; None: the weight itself.

    >>> weight, scales = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.ones(2)
    >>> project_(weight, torch.tensor([[1, 2], [1, 2]]), scales); scales
    tensor([0.6667, 1.3333])
    """
    target = weight if target is None else target
    if scales is None:
        weight.copy_(_per_cluster(target, codes, "mean", importance))
        return
    table = codebook_of(target, codes, scales, importance=importance)
    fit_scales_(scales, target, codes, table, importance)
    for part in row_parts(weight):
        weight[part] = shared_values(table, codes[part], scales[part])


def shared_values(table: Tensor, codes: Tensor, scales: Tensor | None) -> Tensor:
    """Return what the codes stand for, times the scales of their rows.

    >>> shared_values(torch.tensor([0.0, 3.0]), torch.tensor([[1, 0]]), torch.tensor([2.0]))
    tensor([[6., 0.]])
    """
    values = table[codes]
    return values if scales is None else by_row(scales, values) * values


@torch.no_grad()
def fit_scales_(scales: Tensor, target: Tensor, codes: Tensor, table: Tensor, importance: Tensor | None) -> None:
    """Give each row the scale of least squares; one of zeros, or one that turned round, keeps its own.

    >>> scales = torch.ones(1)
    >>> fit_scales_(scales, torch.tensor([[2.0, 6.0]]), torch.tensor([[1, 2]]), torch.tensor([0.0, 1.0, 3.0]), None)
    >>> scales
    tensor([2.])
    """
    for part in row_parts(target):
        shared, wanted = table[codes[part]].flatten(1).double(), target[part].flatten(1).double()
        heed = shared if importance is None else shared * importance[part].flatten(1)
        along, length = (wanted * heed).sum(1), (shared * heed).sum(1)
        fitted = torch.where(length > 0, along / length, 0.0).float()
        scales[part] = torch.where(fitted > 0, fitted, scales[part])


@torch.no_grad()
def take_step_(weight: Tensor, shared: Tensor, hidden: Tensor) -> None:
    """Add to the hidden weight what a step made of the shared one, and put the shared one back.

    Hidden weights of zero are pruned: they stay zero, and no other becomes zero.

    Args:
        weight: After the step; changed in place to what it was.
        shared: The weight before the step.
        hidden: The weight in full precision, changed in place.

    >>> weight, hidden = torch.tensor([1.5, 0.5]), torch.tensor([0.9, 0.0])
    >>> take_step_(weight, torch.tensor([1.0, 0.0]), hidden); weight, hidden
    (tensor([1., 0.]), tensor([1.4000, 0.0000]))
    """
    pruned = hidden == 0
    hidden.add_(weight).sub_(shared)
    hidden.masked_fill_(hidden == 0, _NEARLY_ZERO).masked_fill_(pruned, 0.0)
    weight.copy_(shared)


@torch.no_grad()
def codebook_of(
    weight: Tensor, codes: Tensor, scales: Tensor | None = None, *, importance: Tensor | None = None
) -> Tensor:
    """Return the shared values by code, float32, the mean where weights of a code differ; zero for code 0.

    >>> codebook_of(torch.tensor([0.5, 0.0, 0.5]), torch.tensor([1, 0, 1]))
    tensor([0.0000, 0.5000])
    """
    index, clusters = codes.flatten(), _count(codes)
    if scales is None:
        table = cluster_means(weight, index, clusters, weights=importance)
    else:
        table = _scaled_means(weight, codes, scales, clusters, importance)
    table[0] = 0.0
    return table.float()


def _scaled_means(weight: Tensor, codes: Tensor, scales: Tensor, clusters: int, importance: Tensor | None) -> Tensor:
    """Return the means of weight / scale in each cluster, weighted by importance x scale**2, shape (clusters,)."""
    sums, mass = torch.zeros(2, clusters, dtype=torch.float64, device=weight.device)
    for part in row_parts(weight):
        own, index = by_row(scales[part].double(), weight), codes[part].flatten()
        heed = own.square() if importance is None else own.square() * importance[part]
        add_by(mass, index, heed.expand(weight[part].shape).flatten())
        add_by(sums, index, (weight[part] / own * heed).flatten())
    return torch.where(mass > 0, sums / mass, 0.0)


@torch.no_grad()
def share_gradient_(
    gradient: Tensor, codes: Tensor, how: Gradient, *, weight: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """Give all weights of a cluster the same gradient, and none to those of code 0; see ``share_gradients_``."""
    if scales is None or weight is None:
        gradient.copy_(_per_cluster(gradient, codes, how))
        return
    rows = by_row(scales, gradient)
    # As of any tensor in place of the weight: the change of the values that is nearest to the gradient.
    table = codebook_of(gradient, codes, scales).to(gradient.dtype)
    shared = rows.to(gradient.dtype) * table.index_select(0, codes.flatten()).view(gradient.shape)
    rest, own = (gradient - shared).flatten(1).double(), weight.flatten(1).double()
    length = own.square().sum(1)
    along = torch.where(length > 0, (rest * own).sum(1) / length, 0.0)
    gradient.copy_(shared + (by_row(along, gradient) * weight))


@torch.no_grad()
def reassign_(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    hidden: Tensor,
    books: Codebooks,
    *,
    price: float = 0.0,
    importance: Tensor | None = None,
) -> None:
    """Give every hidden weight the cheapest of the shared values, then fit the values to the hidden weights.

    Hidden weights of zero are pruned and stay zero. Where there are none, code 0 is a value like the others as long as
    weights take it. A shared value that none takes is gone.

    Args:
        weight: The shared weight, changed in place.
        codes: Changed in place.
        scales: Of its rows, changed in place.
        hidden: The weight in full precision.
        books: What the codebooks are like; no blocks.
        price: Of a bit in squared error.
        importance: Of each weight, > 0.

    >>> weight, codes = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1, 1, 2], dtype=torch.int32)
    >>> reassign_(weight, codes, None, torch.tensor([1.2, 2.6, 3.0]), Codebooks()); weight
    tensor([1.2000, 2.8000, 2.8000])
    """
    table = codebook_of(weight, codes, scales)
    assign_codes_(codes, table, hidden, scales, books, price, importance)
    project_(weight, codes, scales, importance=importance, target=hidden)


def assign_codes_(
    codes: Tensor,
    table: Tensor,
    target: Tensor,
    scales: Tensor | None,
    books: Codebooks,
    price: float,
    importance: Tensor | None,
) -> None:
    """Give every weight of ``target`` the code of the cheapest value of ``table``, among those in use; in place."""
    heed = None
    if scales is not None:
        heed = by_row(scales, target).square().expand(target.shape) if price else None
        target = target / by_row(scales, target)
    if importance is not None and price:  # who pays nothing for bits takes the nearest, however important
        heed = importance if heed is None else heed * importance
    flat, index = target.reshape(-1), codes.view(-1)
    dense = int(torch.count_nonzero(flat)) == flat.numel()
    for part in segments(target, books.group_channels):
        live = slice(None) if dense else flat[part] != 0
        own = index[part][live]
        counts = torch.bincount(own, minlength=len(table))
        counts[0] *= dense
        known = counts.nonzero().flatten()
        if not len(known):
            continue
        lengths = code_lengths(own, len(table))[known] if price else None
        found = assign_1d(
            flat[part][live],
            table[known],
            bits=lengths,
            rate=price,
            weights=None if heed is None else heed.reshape(-1)[part][live],
            out=own if dense else None,  # counted above, and not read again
        )
        numbers = known.to(torch.int32)
        for some in chunks(found):
            found[some] = numbers[found[some]]
        if not dense:
            index[part][live] = found


def code_entropy(codes: Tensor, block: int = 1) -> float:
    """Return the order-0 entropy of all codes together, in bits; with blocks, of those of the vectors.

    >>> code_entropy(torch.tensor([0, 1, 1, 2]))
    6.0
    """
    counts = vector_counts(codes, block).double()
    zeros = codes.numel() // block - counts.sum()
    counts = torch.cat([zeros[None], counts])
    counts = counts[counts > 0]
    return abs(float(-(counts * (counts / counts.sum()).log2()).sum()))


def vector_counts(codes: Tensor, block: int) -> Tensor:
    """Return how many blocks take each vector of the codebook; those that are all zero are not counted."""
    index = (codes.view(-1, block).amax(1) + block - 1) // block if block > 1 else codes.flatten()
    return torch.bincount(index)[1:]


def _per_cluster(values: Tensor, codes: Tensor, reduction: Gradient, importance: Tensor | None = None) -> Tensor:
    index, clusters = codes.flatten(), _count(codes)
    table = cluster_means(values, index, clusters, weights=importance)
    if reduction == "sum":
        table *= torch.bincount(index, minlength=clusters)
    table[0] = 0.0
    return table.to(values.dtype).index_select(0, index).view(values.shape)


def row_parts(tensor: Tensor) -> Iterator[slice]:
    """Yield parts of whole rows, of a bounded size.

    >>> list(row_parts(torch.zeros(3, 4)))
    [slice(0, 16384, None)]
    """
    step = max(1, _PART // max(1, tensor[:1].numel()))
    return (slice(start, start + step) for start in range(0, len(tensor), step))


def segments(weight: Tensor, group_channels: int | None) -> Iterator[slice]:
    """Yield the parts of the flat weight that have a codebook of their own."""
    size = weight.numel() if group_channels is None else group_channels * weight[0].numel()
    return (slice(start, start + size) for start in range(0, weight.numel(), max(size, 1)))


def by_row(scales: Tensor, like: Tensor) -> Tensor:
    """Return the scales in a shape that multiplies the rows of ``like``."""
    return scales.view(-1, *[1] * (like.dim() - 1))


def _count(codes: Tensor) -> int:
    return int(codes.max()) + 1 if codes.numel() else 1
