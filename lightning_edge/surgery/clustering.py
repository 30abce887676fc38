"""Cluster one weight tensor: its codes, and the shared values in the place of its weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_edge.functional.rate import assign_1d, chunks
from lightning_edge.functional.sharing import cluster_means, kmeans_1d
from lightning_edge.functional.vectors import kmeans_vectors
from lightning_edge.surgery.codebooks import Codebooks
from lightning_edge.surgery.shared_state import (
    assign_codes_,
    by_row,
    code_entropy,
    codebook_of,
    fit_scales_,
    row_parts,
    segments,
    shared_values,
    vector_counts,
)

_ROUNDS = 4  # alternations of codes, values and scales: later ones change the error by less than a percent
_ZERO_ROUNDS, _SAMPLE = 20, 30_000


@dataclass(frozen=True)
class Clustered:
    """Codes of one weight tensor (int32, its shape), scales of its rows, number of shared values, squared change."""

    codes: Tensor
    scales: Tensor | None
    clusters: int
    inertia: float


@torch.no_grad()
def cluster_(
    weight: Tensor,
    clusters: int,
    books: Codebooks,
    *,
    price: float = 0.0,
    importance: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Clustered:
    """Replace a weight tensor by its shared values.

    Args:
        weight: Changed in place.
        clusters: Shared non-zero values, of each codebook.
        books: What the codebooks are like; its rate is not looked at.
        price: Of a bit in squared error.
        importance: Of each weight, > 0.
        generator: Source of random starts.

    >>> weight = torch.tensor([[1.0, 3.0], [0.0, 8.0]])
    >>> cluster_(weight, 2, Codebooks()).codes.tolist(), weight.tolist()
    ([[1, 1], [0, 2]], [[2.0, 2.0], [0.0, 8.0]])
    """
    scales = None
    if books.block > 1:
        codes = _cluster_blocks(weight, clusters, books.block, importance, generator)
    elif books.channel_scale:
        codes, scales = _cluster_scaled(weight, clusters, books, price, importance, generator)
    else:
        codes, inertia = _cluster_rows_(weight, clusters, books, price, importance, generator)
    if books.channel_scale or books.block > 1:
        inertia = _settle_(weight, codes, scales, importance)
    return Clustered(codes, scales, int(vector_counts(codes, books.block).count_nonzero()), inertia)


def _settle_(weight: Tensor, codes: Tensor, scales: Tensor | None, importance: Tensor | None) -> float:
    """Replace the weights by what their codes stand for, and return the squared change; a part at a time."""
    table, change = codebook_of(weight, codes, scales, importance=importance), 0.0
    if scales is not None:
        fit_scales_(scales, weight, codes, table, importance)
    for part in row_parts(weight):
        values = shared_values(table, codes[part], None if scales is None else scales[part])
        change += float((weight[part] - values).double().square().sum())
        weight[part] = values
    return change


def _cluster_rows_(
    weight: Tensor,
    clusters: int,
    books: Codebooks,
    price: float,
    importance: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, float]:
    """Return codes and squared change; each segment of rows is clustered, read and written in parts.

    Beyond the weights there is one more number for each at a time, its code. Where zeros are left out there are two: a
    copy without them and its codes, then these and all codes, which are made only when the copy is gone.
    """
    flat = weight.contiguous().view(-1)
    codes: Tensor | None = None
    zero = price > 0 and _live(flat) == flat.numel()
    inertia = 0.0
    for number, part in enumerate(segments(weight, books.group_channels)):
        values, first = flat[part], 1 + number * clusters
        count = _live(values)
        if count == 0:
            continue
        whole = count == len(values)
        own = importance
        if own is not None and (zero or not whole or len(values) < own.numel()):
            own = own.reshape(-1)[part]
        elif own is not None:  # read as it is, so that rows of one importance take no memory
            values = values.view(own.shape)
        centroids, found = kmeans_1d(
            values if whole else _compact(values, values, count),
            clusters,
            init=books.init,
            weights=own if own is None or whole else _compact(own, values, count),
            rate=price,
            generator=generator,
        )
        numbers = first + torch.arange(len(centroids), dtype=torch.int32, device=weight.device)
        better = _with_zero(values, centroids, found, price, own) if zero else None
        if better is not None:
            centroids, found = better
            numbers = torch.cat([numbers.new_zeros(1), first + numbers.new_tensor(range(len(centroids) - 1))])
            del better
        values, found = values.view(-1), found.view(-1)
        if codes is None:  # where the centroids' numbers are those of all weights, codes take their place
            codes = found.view(weight.shape) if len(found) == weight.numel() else _no_codes(weight)
        inertia += _write_(values, codes.view(-1)[part], found, centroids, numbers)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))
    return _no_codes(weight) if codes is None else codes, inertia


def _cluster_scaled(
    weight: Tensor,
    clusters: int,
    books: Codebooks,
    price: float,
    importance: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return codes and the scales of the rows; the weight is left as it is."""
    scales = _root_mean_squares(weight)
    column = by_row(scales, weight)
    unit = (weight / column).contiguous()
    heed = (column.square() if importance is None else column.square() * importance).expand(weight.shape)
    codes, _ = _cluster_rows_(unit, clusters, books, price, heed, generator)
    values = codebook_of(unit, codes)
    del unit, heed  # the first takes as much as the weights, the second too where each weight has its importance
    for _ in range(_ROUNDS):
        assign_codes_(codes, values, weight, scales, books, price, importance)
        values = codebook_of(weight, codes, scales, importance=importance)
        fit_scales_(scales, weight, codes, values, importance)
    return codes, scales


def _root_mean_squares(weight: Tensor) -> Tensor:
    """Return those of the weights of each row that are not zero; 1 for a row of zeros."""
    scales = weight.new_ones(len(weight), dtype=torch.float32)
    for part in row_parts(weight):
        rows = weight[part].flatten(1)
        found = (rows.double().square().sum(1) / (rows != 0).sum(1).clamp(min=1)).sqrt().float()
        scales[part] = torch.where(found == 0, 1.0, found)
    return scales


def _cluster_blocks(
    weight: Tensor, clusters: int, block: int, importance: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Return codes; the weight is left as it is."""
    vectors = weight.reshape(-1, block)
    live = (vectors != 0).any(1)
    if not bool(live.any()):
        return _no_codes(weight)
    values = vectors if bool(live.all()) else vectors[live]
    whole = bool((values != 0).all())
    heed = None if importance is None else importance.reshape(-1, block)
    heed = heed if heed is None or values is vectors else heed[live]
    if not whole:  # a zero stays zero, whatever the codebook says there
        heed = (values != 0).to(values.dtype) * (1.0 if heed is None else heed)
    _, found = kmeans_vectors(values, clusters, weights=heed, generator=generator)
    del heed
    codes, place = _no_codes(weight), torch.arange(block, dtype=torch.int32, device=weight.device)
    flat, start = codes.view(-1, block), 0
    for part in chunks(vectors):
        own = found[start : start + int(live[part].sum())]
        start += len(own)
        flat[part][live[part]] = (1 + own[:, None] * block + place) * (vectors[part][live[part]] != 0)
    return codes


def _no_codes(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)


def _with_zero(
    values: Tensor, centroids: Tensor, codes: Tensor, price: float, importance: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return values and codes with zero as one more value, the first; None if that costs over a percent more.

    Zero and the clusters beside it then share out the middle anew. That happens on 30,000 of the values at most.
    """
    step = -(-len(values) // _SAMPLE)
    sample, heed = values[::step].contiguous(), None if importance is None else importance[::step].contiguous()
    table = torch.cat([centroids.new_zeros(1), centroids])
    counts = torch.bincount(codes[::step] + 1, minlength=len(table)).double()
    counts[0] = counts[1 + centroids.abs().argmin()]  # to begin with, as if they shared a code
    found = codes[:0]
    for _ in range(_ZERO_ROUNDS):
        table, counts = table[counts > 0], counts[counts > 0]
        lengths = (counts.sum() / counts).log2()
        before, found = found, assign_1d(sample, table, bits=lengths, rate=price, weights=heed)
        if torch.equal(found, before):
            break
        counts = torch.bincount(found, minlength=len(table)).double()
        table = cluster_means(sample, found, len(table), weights=heed).to(values.dtype)
        table[0] = 0.0
        counts[0] = counts[0].clamp(min=0.5)
    table, lengths = table[counts > 0], (counts.sum() / counts[counts > 0]).log2()
    found = assign_1d(values, table, bits=lengths, rate=price, weights=importance)
    means = cluster_means(values, found, len(table), weights=importance).to(values.dtype)
    means[0] = 0.0
    cost = _cost(values, means, found, price, importance)
    return (means, found) if cost <= 1.01 * _cost(values, centroids, codes, price, importance) else None


def _cost(values: Tensor, table: Tensor, codes: Tensor, price: float, importance: Tensor | None) -> float:
    """Return squared error and priced code lengths of all values."""
    cost = price * code_entropy(codes)
    for part in chunks(values):
        square = (values[part] - table[codes[part]]).double().square()
        cost += float((square if importance is None else square * importance[part]).sum())
    return cost


def _write_(values: Tensor, codes: Tensor, found: Tensor, table: Tensor, numbers: Tensor) -> float:
    """Write shared values and codes where a value is not zero, and return the squared change."""
    inertia, start = 0.0, 0
    for part in chunks(values):
        old = values[part]
        live = old != 0
        own = found[start : start + int(live.sum())]
        start += len(own)
        new = torch.zeros_like(old)
        new[live] = table[own]
        inertia += float((old - new).double().square().sum())
        codes[part][live] = numbers[own]
        values[part] = new
    return inertia


def _live(flat: Tensor) -> int:
    return sum(int(torch.count_nonzero(flat[part])) for part in chunks(flat))


def _compact(tensor: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the elements where ``values`` is not zero; a single selection would take two numbers for each of them."""
    chosen, start = tensor.new_empty(count), 0
    for part in chunks(values):
        own = tensor[part][values[part] != 0]
        chosen[start : start + len(own)] = own
        start += len(own)
    return chosen
