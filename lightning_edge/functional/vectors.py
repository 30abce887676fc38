"""Vector codebooks: neighbouring weights of a Linear layer share a whole block of values, one code for two or four.

Product quantization of weights (Gong et al. 2014, arXiv:1412.6115; Jegou, Douze, Schmid 2011): k-means over blocks.
"""

import torch
from torch import Tensor

from lightning_edge.functional.rate import Importance, add_by, chunks
from lightning_edge.functional.sharing import check_clusters

_DISTANCES = 1 << 20  # in flight at a time, whatever the number of vectors and centroids
_START_VECTORS = 1 << 15  # what k-means++ draws from: each of its draws reads all of them


def kmeans_vectors(
    values: Tensor,
    clusters: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster vectors: return the centroids and the index of each vector's centroid.

    Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007; among at most 32,768 vectors or four per
    cluster, drawn at random). A cluster that runs empty is put on one of the vectors of the largest error. Memory
    beyond ``values``: two numbers of four bytes for each vector, and about 20 MB.

    Args:
        values: Finite numbers, shape (n, block), not empty.
        clusters: Largest number of centroids, >= 1.
        weights: Importance of each number, >= 0, shape of ``values``: the error is the sum of weight * difference**2.
        iterations: Most rounds of assignment and means, >= 1; they end earlier when no code changes.
        generator: Source of the random draws of the start.

    Returns:
        Centroids of shape (k, block), dtype of ``values``, k <= ``clusters`` (fewer when there are fewer distinct
        vectors), each the mean of its vectors; and int32 codes of shape (n,).

    Raises:
        ValueError: If ``values`` is not two-dimensional, empty or not finite, or another argument is out of its range.

    >>> kmeans_vectors(torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 1.0]]), 2)[0].sort(0).values
    tensor([[0., 1.],
            [5., 5.]])
    """
    check_clusters(clusters)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"values must be of shape (n, block), not empty, got {tuple(values.shape)}")
    blocks = _Blocks(values, weights)
    centroids = _start(values, weights, clusters, generator)
    codes = torch.full((len(values),), -1, dtype=torch.int32, device=values.device)
    for left in reversed(range(iterations)):
        changed, errors = blocks.assign_(codes, centroids)
        if not changed:
            break
        centroids, used = blocks.means(codes, len(centroids))
        empty = (~used).nonzero().flatten()
        if left and len(empty):
            centroids[empty] = values[errors.topk(len(empty)).indices].to(centroids)
    renumber = (used.cumsum(0) - 1).to(torch.int32)
    return centroids[used].to(values.dtype), renumber.index_select(0, codes)


class _Blocks:
    """The vectors and their importance, read in parts of bounded size."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        self._values = values.detach()
        self._importance = None if weights is None else Importance(weights, values)
        self._dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        if not all(bool(self._values[rows].isfinite().all()) for rows in chunks(self._values)):
            raise ValueError("values must be finite, got an infinite value or NaN: the network has diverged")

    def assign_(self, codes: Tensor, centroids: Tensor) -> tuple[bool, Tensor]:
        """Give every vector the code of its nearest centroid; return if any changed, and the squared errors.

        The products have two to four terms, which every kernel adds up in one order: threads change nothing.
        """
        count, changed = len(self._values), False
        errors = torch.empty(count, dtype=self._dtype, device=self._values.device)
        squares = centroids.square()
        lengths = squares.sum(1)
        step = max(1, _DISTANCES // len(centroids))
        for part in (slice(start, start + step) for start in range(0, count, step)):
            value, weight = self._read(part)
            # weight * (value - centroid)**2, without the term that is the same for every centroid
            if weight is None:
                distance = torch.addmm(lengths, value, centroids.T, alpha=-2.0)
                own = value.square().sum(1)
            else:
                distance = torch.addmm(weight @ squares.T, weight * value, centroids.T, alpha=-2.0)
                own = (weight * value.square()).sum(1)
            least, nearest = distance.min(1)
            changed |= bool((codes[part] != nearest).any())
            codes[part] = nearest
            errors[part] = least + own
        return changed, errors

    def means(self, codes: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of every cluster, and which clusters hold any vector."""
        block = self._values.shape[1]
        sums, mass = torch.zeros(2, clusters * block, dtype=torch.float64, device=codes.device)
        column = torch.arange(block, device=codes.device)
        for rows in chunks(codes):
            value, weight = self._read(rows)
            cell = (codes[rows, None] * block + column).flatten()
            add_by(mass, cell, None if weight is None else weight.double().flatten())
            add_by(sums, cell, (value if weight is None else value * weight).double().flatten())
        means = torch.where(mass > 0, sums / mass, 0.0).view(clusters, block)
        return means.to(self._dtype), mass.view(clusters, block)[:, 0] > 0

    def _read(self, part: slice) -> tuple[Tensor, Tensor | None]:
        value = self._values[part].to(self._dtype)
        if self._importance is None:
            return value, None
        block = value.shape[1]
        flat = slice(part.start * block, part.stop * block)
        return value, self._importance(flat).to(self._dtype).view_as(value)


def _start(values: Tensor, weights: Tensor | None, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Return centroids drawn among some of the vectors, each with odds of its error so far."""
    wanted = max(_START_VECTORS, 4 * clusters)
    if len(values) > wanted:
        rows = torch.randint(len(values), (wanted,), generator=generator).to(values.device)
        values, weights = values[rows], None if weights is None else weights[rows]
    sample = values.detach().cpu().double()
    importance = torch.ones_like(sample)
    if weights is not None:
        importance = Importance(weights, values)(slice(None)).view_as(sample).cpu()
    chosen = [int(torch.randint(len(sample), (1,), generator=generator))]
    errors = torch.full((len(sample),), torch.inf, dtype=torch.float64)
    while len(chosen) < clusters:
        errors = torch.minimum(errors, (importance * (sample - sample[chosen[-1]]).square()).sum(1))
        if not bool(errors.any()):
            break
        chosen.append(int(torch.multinomial(errors, 1, generator=generator)))
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return sample[chosen].to(values.device, dtype)
