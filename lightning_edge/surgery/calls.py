"""What a network is called with, in one form whichever way it was given: by position, by name, nested in dicts."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Arguments(tuple[Any, ...]):
    """Positional arguments of a network, and beside them those that it takes by name alone.

    >>> Arguments((1, 2)).named
    mappingproxy({})
    """

    named: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, args: Iterable[Any], named: Mapping[str, Any]) -> "Arguments":
        """Return the arguments of a call."""
        found = cls(args)
        if named:
            found.named = dict(named)
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor in them, in the order of the arguments."""
        return [leaf for leaf in tree_leaves([[*self], {**self.named}]) if isinstance(leaf, Tensor)]

    @property
    def rows(self) -> int:
        """The batch size: that of the first tensor which has dimensions."""
        return next(len(value) for value in self.tensors if value.ndim)

    def map(self, change: Callable[[Tensor], Any]) -> "Arguments":
        """Return the same arguments with every tensor changed."""
        args, named = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, [[*self], {**self.named}]
        )
        return Arguments.of(args, named)

    def first(self, count: int) -> "Arguments":
        """Return the first rows of the batch."""
        rows = self.rows
        return self.map(lambda value: value[:count] if value.ndim and len(value) == rows else value)

    def batched(self, size: Callable[[Tensor], Any]) -> "Arguments":
        """Return the same arguments with each tensor that has the batch's rows changed, and None for any other leaf."""
        rows = self.rows

        def changed(leaf: object) -> Any:
            return size(leaf) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows else None

        return Arguments.of(*tree_map(changed, [[*self], {**self.named}]))


def arguments_of(network: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Arguments:
    """Return a call's arguments by position as far as its ``forward`` allows, without trailing ones at their default.

    Raises:
        TypeError: If ``forward`` does not take them.

    >>> arguments_of(nn.Linear(2, 2), (), {"input": 1})
    (1,)
    """
    parameters = inspect.signature(type(network).forward)
    bound = parameters.bind(network, *args, **named)
    spare = [item for item in parameters.parameters.values() if item.kind in BY_POSITION][1:]
    while spare and bound.arguments.get(spare[-1].name, spare[-1].default) is spare[-1].default:
        bound.arguments.pop(spare.pop().name, None)
    for parameter in spare:
        bound.arguments.setdefault(parameter.name, parameter.default)
    return Arguments.of(bound.args[1:], bound.kwargs)


def as_arguments(network: nn.Module, inputs: object, *, argument: str = "example_inputs") -> Arguments:
    """Return a tuple of positional inputs, or a dict of inputs by name, as arguments of the network.

    Args:
        network: What takes them.
        inputs: A tuple or a mapping; somewhere in it a tensor, batch first.
        argument: What the caller calls them.

    Raises:
        ValueError: If they are neither, hold no tensor with a batch dimension, or ``forward`` does not take them.

    >>> as_arguments(nn.Linear(2, 2), {"input": torch.zeros(3, 2)}).rows
    3
    """
    if isinstance(inputs, Arguments):
        return inputs
    args, named = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    if not isinstance(args, tuple) or not any(value.ndim for value in Arguments.of(args, named).tensors):
        raise ValueError(_refusal(argument, inputs))
    try:
        return arguments_of(network, args, named)
    except TypeError as error:
        raise ValueError(f"{argument} must be what {type(network).__name__} takes, got: {error}") from error


def call_during(network: nn.Module, run: Callable[[], object]) -> Arguments | None:
    """Return what the network is called with first while ``run`` runs, which is cut off there; None without a call.

    >>> network = nn.Linear(2, 2)
    >>> call_during(network, lambda: network(torch.zeros(3, 2)).no_such_attribute).rows
    3
    """
    seen: list[Arguments] = []

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(arguments_of(network, args, named))
        raise _CalledError

    handle = network.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _CalledError:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


class _CalledError(Exception):
    """Cuts off what calls a network, once it is known with what."""


def joined(parts: Sequence[Arguments]) -> Arguments:
    """Return several batches as one; what has no rows of the batch is that of the first."""
    leaves, specs = zip(*(tree_flatten([[*part], {**part.named}]) for part in parts), strict=True)
    rows = parts[0].rows
    values = [
        torch.cat(same) if isinstance(same[0], Tensor) and same[0].ndim and len(same[0]) == rows else same[0]
        for same in zip(*leaves, strict=True)
    ]
    return Arguments.of(*tree_unflatten(values, specs[0]))


def two_rows(inputs: Arguments) -> Arguments:
    """Return inputs for tracing, which takes a size of 1 for a constant: a batch of one twice.

    Copies, since a tensor that was made in inference mode cannot be traced.
    """
    return inputs.map(lambda value: torch.cat([value, value]) if value.ndim and len(value) == 1 else value.clone())


def _refusal(argument: str, inputs: object) -> str:
    kinds = [type(value).__name__ for value in inputs] if isinstance(inputs, tuple | list) else "not a tuple"
    return (
        f"{argument} must be a tuple of tensors with a batch dimension, or a dict of them by name, got a"
        f" {type(inputs).__name__}: {kinds}"
    )
