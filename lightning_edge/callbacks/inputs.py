"""What a network is called with: seen at its first call, kept in checkpoints as shapes and types."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NetworkInputs:
    """Shapes (without the batch) and types of a network's inputs.

    >>> inputs = NetworkInputs()
    >>> inputs.remember(torch.zeros(8, 3)); inputs.state()
    [([3], 'float32')]
    """

    def __init__(self, state: Sequence[tuple[Sequence[int], str]] = ()) -> None:
        self._seen = [(list(shape), dtype) for shape, dtype in state]
        self._handle: RemovableHandle | None = None
        self._example: tuple[Any, ...] | None = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def state(self) -> list[tuple[list[int], str]]:
        """Return what a checkpoint keeps: numbers and strings."""
        return [(list(shape), dtype) for shape, dtype in self._seen]

    def watch(self, pl_module: L.LightningModule, network: nn.Module) -> None:
        """Look at the next call of the network, once; the sanity check of a fit is early enough.

        Where that call has other things than tensors, or none comes in time, the module's ``example_input_array``
        counts: a tensor, a tuple or a mapping, as Lightning takes it.
        """
        self._example = _example_inputs(pl_module, network)
        if not self._seen and self._handle is None:
            self._handle = network.register_forward_pre_hook(self._look, with_kwargs=True)

    def take_from(self, batch: Any) -> None:
        """Take the module's ``example_input_array``, else what a batch has first, unless a call was seen already."""
        if not self._seen:
            self.remember(_first(batch) if self._example is None else self._example)

    def remember(self, inputs: Any) -> None:
        """Keep shapes and types.

        Raises:
            ValueError: If an input is no tensor.
        """
        tensors = inputs if isinstance(inputs, list | tuple) else [inputs]
        if not tensors or not all(isinstance(value, Tensor) for value in tensors):
            raise ValueError(
                f"the network's inputs must be tensors, got {[type(value).__name__ for value in tensors]}: set"
                " example_input_array of the LightningModule to the network's inputs"
            )
        self._seen = [(list(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch.")) for tensor in tensors]

    def example(self, device: torch.device, *, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return inputs of two rows (a batch of one would become a constant of a traced graph).

        Args:
            device: Where they go.
            generator: Draws normal numbers for the real inputs; without one, and for whole numbers, they are zero.
        """
        return tuple(self._one([2, *shape], getattr(torch, dtype), generator).to(device) for shape, dtype in self._seen)

    def _one(self, shape: list[int], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        if generator is None or not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    def _look(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        inputs = _by_position(network, args, kwargs)
        known = self._example is None or all(isinstance(value, Tensor) for value in inputs)
        self.remember(inputs if known else self._example)


def _example_inputs(pl_module: L.LightningModule, network: nn.Module) -> tuple[Any, ...] | None:
    """Return what the module gives as an example, as the network's positional inputs; None if it gives none."""
    example = pl_module.example_input_array
    if example is None or isinstance(example, list | tuple):
        return None if example is None else tuple(example)
    if not isinstance(example, Mapping):
        return (example,)
    try:
        return _by_position(network, (), dict(example))
    except TypeError:  # of a module whose forward has other names than the network's
        return (example,)


def _by_position(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the inputs of a call by position, without None at the end; those that have no position as one mapping."""
    inputs = list(args)
    if kwargs:
        bound = inspect.signature(network.forward).bind(*args, **kwargs)
        inputs = [*bound.args, bound.kwargs] if bound.kwargs else [*bound.args]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return tuple(inputs)


def _first(batch: Any) -> Any:
    """Return what a batch of (inputs, targets) has first; a batch that is a tensor is the input."""
    return batch[0] if isinstance(batch, list | tuple) else batch
