"""What a network returns, whatever holds it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flat_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a tensor, or of nested tuples, lists and mappings, in order.

    >>> one = Tensor([1.0])
    >>> len(flat_tensors((one, {"a": one})))
    2
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [tensor for value in outputs or () for tensor in flat_tensors(value)]
