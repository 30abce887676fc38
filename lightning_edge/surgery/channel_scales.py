"""Find codebook and scales per output channel again, from nothing but the weights."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
MAX_SCALED_VALUES = 256
"""Most values of a codebook that is found again: the search takes their number squared for each channel."""
_TOLERANCE = 1e-6  # a weight is a rounded product: a ratio of two of them is off by up to 2.4e-7


def channel_scales(weight: Tensor, *, clusters_limit: int = MAX_SCALED_VALUES) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return scales, codes and codebook of a weight that is ``scales[r] * codebook[codes[r]]``, None if it is none.

    The row with the most distinct values is taken as the codebook. Every other row gets the scale at which its values
    are in the codebook; a value that is not is added to it. Rows that have nothing in common with the codebook wait
    until it has grown. What only one codebook for all rows could gain nothing by is none either: a weight of no more
    different values than scales and codebook would have together.

    Args:
        weight: Shape (rows, ...), a row for each output channel.
        clusters_limit: Largest number of values of the codebook, without zero.

    Returns:
        ``scales`` > 0, float32 of shape (rows,), 1 for rows of zeros; int32 ``codes`` of the shape of ``weight``; and
        the ``codebook``, float32 in ascending order but for zero, which comes first and is always there. Their product
        is the weight within a millionth of each of its values.

    >>> weight = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.5, 1.0, 1.5, 1.0], [6.0, 4.0, 0.0, 2.0]])
    >>> channel_scales(weight)[::2]
    (tensor([1.0000, 0.5000, 2.0000]), tensor([0., 1., 2., 3.]))
    """
    rows = weight.detach().cpu().double().flatten(1).numpy()
    values = [np.unique(row[row != 0]) for row in rows]
    most = max((len(row) for row in values), default=0)
    distinct = len(np.unique(rows))
    if most == 0 or most > clusters_limit or distinct <= len(rows) + most or not np.isfinite(rows).all():
        return None
    codebook = next(row for row in values if len(row) == most)
    scales = np.ones(len(rows))
    waiting = [index for index, row in enumerate(values) if len(row)]
    while waiting:
        # Rows of many values first: they say most about their scale, and bring the codebook what others lack.
        waiting.sort(key=lambda index: -len(values[index]))
        left = []
        for index in waiting:
            scale, found = _best_scale(values[index], codebook)
            if found < min(2, len(values[index])):
                left.append(index)
                continue
            scales[index], codebook = scale, _extended(codebook, values[index] / scale)
            if len(codebook) > clusters_limit:
                return None
        if len(left) == len(waiting):  # nothing in common with any other row: one of them starts anew, as it is
            codebook = _extended(codebook, values[left[0]])
            left = left[1:]
        waiting = left
    if len(codebook) > clusters_limit or distinct <= len(rows) + len(codebook):
        return None
    codes = np.zeros(rows.shape, dtype=np.int32)
    live = rows != 0
    codes[live] = _nearest((rows / scales[:, None])[live], codebook) + 1
    table = torch.from_numpy(np.concatenate([[0.0], codebook])).float()
    return torch.from_numpy(scales).float(), torch.from_numpy(codes).view(weight.shape), table


def _best_scale(values: Floats, codebook: Floats) -> tuple[float, int]:
    """Return the scale > 0 that brings the most values into the codebook, and how many; 0 if it has none of the sign.

    One of the values is in the codebook at that scale: each is tried in turn, the largest first, until most of them
    are. Of equally good scales, the one nearest to 1.
    """
    best, most = 1.0, 0
    for anchor in values[np.abs(values).argsort()[::-1]]:
        scales = anchor / codebook[codebook * anchor > 0]
        if len(scales):
            scales = scales[np.abs(np.log(scales)).argsort(kind="stable")]
            wanted = values[None, :] / scales[:, None]
            hits = _is_near(codebook[_nearest(wanted, codebook)], wanted).sum(1)
            if hits.max() > most:
                best, most = float(scales[hits.argmax()]), int(hits.max())
        if 2 * most > len(values):
            break
    return best, most


def _extended(codebook: Floats, values: Floats) -> Floats:
    fresh = values[~_is_near(codebook[_nearest(values, codebook)], values)]
    return np.sort(np.concatenate([codebook, fresh]))


def _nearest(values: Floats, codebook: Floats) -> NDArray[np.int64]:
    right = np.searchsorted(codebook, values).clip(1, max(len(codebook) - 1, 1))
    last = np.minimum(right, len(codebook) - 1)
    nearest: NDArray[np.int64] = np.where(values - codebook[right - 1] <= codebook[last] - values, right - 1, last)
    return nearest


def _is_near(found: Floats, values: Floats) -> NDArray[np.bool_]:
    return np.abs(found - values) <= _TOLERANCE * np.abs(values)
