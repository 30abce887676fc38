"""Let weights come back: which connections are exchanged while the sparsity stays."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_edge.functional.pruning import smallest_masks


@dataclass(frozen=True)
class RigL:
    """Exchange the smallest weights for zeros of large gradient (Evci et al. 2020, arXiv:1911.11134).

    Every ``every_n_steps``, in each layer, a fraction of its connections that falls with a half cosine from
    ``drop_fraction`` to 0 at ``end_step``.

    Args:
        every_n_steps: Optimizer steps between two exchanges, at least 1.
        end_step: Optimizer step after which nothing is exchanged any more (the paper: three quarters of the training).
        drop_fraction: Fraction of a layer's connections that is exchanged at first, in (0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    >>> RigL(every_n_steps=100, end_step=1000).fraction_at(500)
    0.15
    """

    every_n_steps: int
    end_step: int
    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("every_n_steps", self.every_n_steps), ("end_step", self.end_step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0.0 < self.drop_fraction < 1.0:
            raise ValueError(f"drop_fraction must lie in (0, 1), got {self.drop_fraction}")

    def fraction_at(self, step: int) -> float:
        """Return which fraction of a layer's connections is exchanged at a step; 0 where nothing is."""
        if step % self.every_n_steps or not 0 < step < self.end_step:
            return 0.0
        return round(self.drop_fraction / 2 * (1 + math.cos(math.pi * step / self.end_step)), 12)


@dataclass(frozen=True)
class Splicing:
    """Let pruned weights go on learning out of sight, and come back when they are large enough.

    Guo et al. 2016, "Dynamic Network Surgery" (arXiv:1608.04493), equation 3. What an optimizer step would have made of
    a zero is added up beside it; at every decision of the schedule the sums compete with the weights that are left.
    """


def exchanged_mask(weight: Tensor, gradient: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    """Return the mask after the smallest connections of a layer were dropped and as many of large gradient grown.

    Args:
        weight: The layer's weights.
        gradient: Dense gradient, same shape.
        mask: True = kept.
        fraction: Fraction of the connections that is dropped, in [0, 1].

    Returns:
        A mask with as many True as before. What was dropped may be grown again (as a zero).

    >>> exchanged_mask(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 5.0]), torch.tensor([True, True, False]),
    ...                fraction=0.5)
    tensor([ True, False,  True])
    """
    dropped = int(int(mask.sum()) * fraction)
    # A pruned weight is larger than any: it cannot be dropped a second time.
    size = torch.where(mask, weight.detach().float().abs(), torch.finfo(torch.float32).max)
    left = smallest_masks([size], count=dropped)[0] & mask
    wanted = torch.where(left, torch.finfo(torch.float32).max, gradient.detach().float().abs())
    return smallest_masks([wanted], count=mask.numel() - int(mask.sum()))[0]


REGROWTHS = (RigL, Splicing)
