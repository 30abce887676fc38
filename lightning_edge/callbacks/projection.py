"""Keep pruned weights at zero: masks are applied after every optimizer step, by one operation on their bits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Projection:
    """A step post-hook for optimizers that sets masked weights to +0.0.

    Registered on the optimizer itself, it also runs under manual optimization, gradient accumulation, a grad scaler and
    several optimizers; neither momentum nor weight decay revives a weight.

    Args:
        hidden: Where to add up what the steps would have made of pruned weights, by name; None: it is dropped.
    """

    def __init__(self, hidden: dict[str, Tensor] | None = None) -> None:
        self._hidden = hidden
        self._names: list[str] = []
        self._weights: list[Tensor] = []
        self._bits: list[Tensor] = []

    def set_masks(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Keep these weights at zero where their mask is False; nothing with an empty ``masks``.

        Args:
            weights: Name to weight; those without a mask are left alone.
            masks: Name to mask of the weight's shape, True = kept.
        """
        self._names = list(masks)
        self._weights = [weights[name] for name in masks]
        self._bits = [_bits_of(mask, weights[name]) for name, mask in masks.items()]

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Zero the weights."""
        for name, weight, bits in zip(self._names, self._weights, self._bits, strict=True):
            if self._hidden is not None:
                self._hidden[name].add_(weight.masked_fill(bits.bool(), 0.0))
            _and_(weight, bits)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights."""
        for weight, bits in zip(self._weights, self._bits, strict=True):
            if weight.grad is not None:
                _and_(weight.grad, bits)


def _bits_of(mask: Tensor, weight: Tensor) -> Tensor:
    """Return integers of the weight's size and strides: all ones where it is kept, zero elsewhere."""
    bits = torch.zeros_like(weight, dtype=_INTEGERS[weight.element_size()])
    return bits.masked_fill_(mask.to(weight.device), -1)


def _and_(tensor: Tensor, bits: Tensor) -> None:
    # Not a product: that is as fast, but a negative number times zero is -0.0, and NaN stays NaN. A product with, or a
    # filling by, a boolean mask takes seven times as long.
    tensor.view(bits.dtype).bitwise_and_(bits)
