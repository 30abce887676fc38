"""Copies of a network to try things on, whatever its hooks hold."""

import copy
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copied(network: Network) -> Network:
    """Return a deep copy whose hooks are the network's own.

    A hook of the user's often holds what it saw, an activation in the middle of a step or the whole LightningModule.
    Neither can be copied (tensors that are no leaves), nor would anybody look for what a copied hook recorded.

    >>> network = nn.Linear(2, 2)
    >>> handle = network.register_forward_hook(print)
    >>> list(copied(network)._forward_hooks.values()) == [print]
    True
    """
    memo: dict[int, object] = {}
    for layer in network.modules():
        for name in _HOOKS:
            hooks = layer.__dict__[name]
            memo[id(hooks)] = copy.copy(hooks)
    return copy.deepcopy(network, memo)
