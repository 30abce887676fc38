"""Let pruned weights of a network come back, and put all of them back to what they were."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.functional.regrowth import exchanged_mask
from lightning_edge.surgery.pruning import apply_masks_


@torch.no_grad()
def exchange_(
    weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], optimizer: Optimizer, *, fraction: float
) -> dict[str, Tensor]:
    """Drop the smallest connections of each layer and grow as many of large gradient (Evci et al. 2020, RigL).

    Args:
        weights: Those with a gradient.
        masks: Of all weights, True = kept.
        optimizer: What it has gathered of a connection while it was not there is set to zero.
        fraction: Fraction of a layer's connections that is exchanged, in [0, 1].

    Returns:
        The new masks, to be applied: what is grown starts at zero.

    >>> weight = nn.Parameter(torch.tensor([3.0, 1.0, 0.0])); weight.grad = torch.tensor([0.0, 1.0, 5.0])
    >>> exchange_({"w": weight}, {"w": weight != 0}, torch.optim.SGD([weight]), fraction=0.5)["w"]
    tensor([ True, False,  True])
    """
    exchanged = dict(masks)
    for name, weight in weights.items():
        assert weight.grad is not None
        exchanged[name] = exchanged_mask(weight, weight.grad, masks[name], fraction=fraction)
        fresh = exchanged[name] & ~masks[name]
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(fresh, 0.0)
    return exchanged


@torch.no_grad()
def splice_(weights: Mapping[str, Tensor], hidden: dict[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Give every number to its side of a mask: weights that are kept, and what pruned ones hide (Guo et al. 2016).

    Args:
        weights: The weights, by name.
        hidden: What pruned weights have become out of sight; names that are missing are added.
        masks: True = kept.

    >>> weights, hidden = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> splice_(weights, hidden, {"w": torch.tensor([False, True])}); weights["w"], hidden["w"]
    (tensor([0., 2.]), tensor([1., 0.]))
    """
    for name, weight in weights.items():
        out_of_sight = hidden.setdefault(name, torch.zeros_like(weight))
        whole = weight + out_of_sight
        out_of_sight.copy_(whole.masked_fill(masks[name], 0.0))
        weight.copy_(whole.masked_fill_(masks[name].logical_not(), 0.0))


@torch.no_grad()
def state_to_rewind(network: nn.Module, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a network's state, with what its pruned weights hide.

    >>> state_to_rewind(nn.Linear(1, 1), {"weight": torch.ones(1, 1)}).keys() == nn.Linear(1, 1).state_dict().keys()
    True
    """
    early = {name: value.detach().clone() for name, value in network.state_dict().items()}
    for name, value in hidden.items():
        early[name] += value
    return early


@torch.no_grad()
def rewind_(network: nn.Module, early: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Put a network back to an early state, under the masks of now (Frankle et al. 2019, arXiv:1903.01611).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> rewind_(layer, {"weight": torch.ones(1, 2)}, {"weight": torch.tensor([[True, False]])}); layer.weight.tolist()
    [[1.0, 0.0]]
    """
    network.load_state_dict(early)
    apply_masks_(dict(network.named_parameters(remove_duplicate=False)), masks)
