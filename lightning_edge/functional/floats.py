"""The order-preserving integer form of float32: the key of every histogram over weights or scores."""

import torch
from torch import Tensor

_INFINITY = 0x7F800000


def sortable_bits(values: Tensor, *, what: str) -> Tensor:
    """Return finite numbers as int32 keys, flat, in the same order as the numbers; both zeros have one key.

    The upper bits of a key are a logarithmic bucket (sign, exponent, first bits of the mantissa), so a histogram over
    them has the same relative resolution everywhere and no outlier can spoil it, as it would with equal widths.

    Args:
        values: Numbers of any shape, compared as float32.
        what: What the numbers are, for the error.

    Raises:
        ValueError: If a value is infinite or not a number.

    >>> sortable_bits(torch.tensor([-1.0, -0.0, 0.0, 1.0]), what="scores").diff().sign()
    tensor([1, 0, 1], dtype=torch.int32)
    """
    bits = (values.detach().flatten().float() + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if keys.numel():
        low, high = (int(key) for key in keys.aminmax())
        if high >= _INFINITY or low <= ~_INFINITY:
            raise ValueError(f"{what} must be finite, got an infinite value or NaN: the network has diverged")
    return keys
