"""Integers of a layer whose weights are shared with a scale per output channel: each shared value is rounded once."""

import torch
from torch import Tensor

from lightning_edge.surgery.channel_scales import channel_scales

_LARGEST = 127


def shared_integers(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return integers and steps of a weight that is a scale per channel times shared values, None if it is none.

    Rounded by its own range, each channel makes other integers of the same shared values. Here the codebook is rounded,
    and its step times the scale is the step of a channel: a layer of k shared values has k integers. A batch norm of
    negative weight turns the sign of its channel: then up to 2 k.

    Args:
        weight: Shape (channels, ...), with the batch norm behind it folded in.

    Returns:
        int8 of the shape of ``weight``, and float32 steps, shape (channels,).

    >>> weight = torch.tensor([[1.0, -2.0, 1.0, 1.0, -2.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5, -1.0]]).repeat(1, 2)
    >>> shared_integers(weight)[0].unique()
    tensor([-127,    0,   64], dtype=torch.int8)
    """
    rows = weight.detach().flatten(1)
    if 2 * max(len(row.unique()) for row in rows) > rows.shape[1]:  # not worth a search, nor likely shared
        return None
    found = channel_scales(weight)
    if found is None:
        return None
    scales, codes, codebook = (part.to(weight.device) for part in found)
    step = codebook.abs().max() / _LARGEST
    return torch.round(codebook / step).to(torch.int8)[codes.long()], scales * step
