"""The sizes of a network's layers, as a manifest that a checkpoint can carry and a plain network can be given."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.surgery.heads import narrow_
from lightning_edge.surgery.selection import check_built
from lightning_edge.surgery.slicing import Side, cut_, is_depthwise, width

_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "num_features",
    "num_parameters",
    "num_heads",
)


Manifest = dict[str, dict[str, int]]
WIDTHS_KEY = "lightning_edge.widths"
"""Where a checkpoint of a narrow network carries its manifest."""


def widths_of(module: nn.Module) -> Manifest:
    """Return the sizes that the layers of a network state, by name.

    >>> widths_of(nn.Linear(3, 5))
    {'': {'in_features': 3, 'out_features': 5}}
    """
    return {
        name: {key: int(getattr(layer, key)) for key in _ATTRIBUTES if isinstance(getattr(layer, key, None), int)}
        for name, layer in module.named_modules()
    }


def changed_widths(before: Manifest, after: Manifest) -> Manifest:
    """Return the sizes that are not what they were: the manifest of a narrower network.

    >>> changed_widths({"fc": {"in_features": 3}}, {"fc": {"in_features": 2}})
    {'fc': {'in_features': 2}}
    """
    changed = {
        name: {key: size for key, size in sizes.items() if size != before[name][key]} for name, sizes in after.items()
    }
    return {name: sizes for name, sizes in changed.items() if sizes}


def read_widths(manifest: Mapping[str, Mapping[str, Any]]) -> Manifest:
    """Return a manifest as plain dictionaries and numbers.

    Raises:
        ValueError: If it is none.

    >>> read_widths({"fc": {"in_features": 3}})
    {'fc': {'in_features': 3}}
    """
    for name, sizes in manifest.items():
        for key, size in sizes.items():
            if key not in _ATTRIBUTES or isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"manifest must give sizes of at least 1 for {list(_ATTRIBUTES)}, got {name}.{key}={size!r}"
                )
    return {str(name): dict(sizes) for name, sizes in manifest.items()}


def load_widths_(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a plain network the widths of a checkpoint whose channels were removed; its weights are loaded afterwards.

    One line in a LightningModule lets ``load_from_checkpoint`` and every ``ckpt_path=`` work without ``ChannelPruning``
    in the trainer::

        def on_load_checkpoint(self, checkpoint):
            load_widths_(self.model, checkpoint)

    Args:
        module: The network that was narrowed, as wide as it was; or as narrow as it became.
        checkpoint: Of Lightning; one without widths is of a wide network, which stays as it is.

    Raises:
        ValueError: If the widths are of another network, or a layer is not built yet.

    >>> layer = nn.Linear(3, 5)
    >>> load_widths_(layer, {"lightning_edge.widths": {"": {"out_features": 4}}}); layer.weight.shape
    torch.Size([4, 3])
    """
    check_built(module)
    rebuild_(module, checkpoint.get(WIDTHS_KEY, {}))


def has_widths(module: nn.Module, manifest: Manifest) -> bool:
    """Return whether a network has all the sizes of a manifest: whether it is the narrow one.

    >>> has_widths(nn.Linear(3, 5), {"": {"out_features": 4}})
    False
    """
    widths = widths_of(module)
    return all(widths.get(name, {}).get(key) == size for name, sizes in manifest.items() for key, size in sizes.items())


def rebuild_(
    module: nn.Module, manifest: Mapping[str, Mapping[str, Any]], *, optimizers: Iterable[Optimizer] = ()
) -> None:
    """Give the layers of a plain network the sizes of a manifest, keeping the first channels of each.

    The weights that belong there are loaded afterwards. A network that has these sizes already stays as it is.

    Raises:
        ValueError: If the manifest is of another network: an unknown layer, or a size above the layer's.

    >>> layer = nn.Linear(3, 5)
    >>> rebuild_(layer, {"": {"out_features": 4}}); layer.weight.shape
    torch.Size([4, 3])
    """
    layers = dict(module.named_modules())
    sides: dict[Side, Tensor] = {}
    heads: dict[nn.Module, int] = {}
    for name, sizes in read_widths(manifest).items():
        layer = layers.get(name)
        for key, size in sizes.items():
            now = getattr(layer, key, None)
            if not isinstance(now, int) or size > now:
                raise ValueError(f"manifest must be of this network, got {name}.{key}={size}, where it has {now}")
            if layer is None or size == now:
                continue
            if key == "num_heads":
                heads[layer] = size
                if isinstance(layer, nn.MultiheadAttention):
                    sides[Side(name, "out")] = torch.arange(3 * size * layer.head_dim)
                continue
            output = not key.startswith("in_")
            if not output and is_depthwise(layer):
                continue  # its outputs are its inputs
            sides[Side(name, "out" if output else "in")] = _first(layer, size, output=output)
    cut_(module, sides, optimizers=list(optimizers))
    for attention, count in heads.items():
        narrow_(attention, count)


def _first(layer: nn.Module, size: int, *, output: bool) -> Tensor:
    """Return the first ``size`` channels of a side; of a grouped convolution's inputs, the first of every group."""
    groups = getattr(layer, "groups", 1)
    if output or groups == 1:
        return torch.arange(size)
    each = width(layer, output=False) // groups
    return (torch.arange(groups)[:, None] * each + torch.arange(size // groups)).flatten()
