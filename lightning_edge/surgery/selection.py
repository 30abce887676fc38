"""Which network inside a LightningModule, and which of its weights."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

WEIGHTED = (nn.Linear, _ConvNd)
Layer = nn.Linear | _ConvNd
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def network_path(module: nn.Module, path: str | None = None) -> str:
    """Return the dotted path of the network inside ``module``: ``path``, else where it can only be.

    Without a ``path`` it is the network of the student of a ``DistillationModule``, else the only child that holds
    parameters, else (several or none) the module itself, ``""``.

    Raises:
        ValueError: If there is no submodule of that path.

    >>> network_path(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    '0'
    """
    student = getattr(type(module), "student_child", None)
    if path is None and student is not None:  # said by the class: importing it from here would turn the layers around
        inner = network_path(module.get_submodule(student))
        return f"{student}.{inner}" if inner else str(student)
    if path is None:
        children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        owns_parameters = any(True for _ in module.parameters(recurse=False))
        is_network = isinstance(module, WEIGHTED)
        return children[0] if len(children) == 1 and not owns_parameters and not is_network else ""
    names = [name for name, _ in module.named_modules()]
    if path not in names:
        near = difflib.get_close_matches(path, names, n=3) or names[1:4]
        raise ValueError(f"network must be a dotted path inside {type(module).__name__}, got {path!r}; near: {near}")
    return path


def find_network(module: nn.Module, path: str | None = None) -> nn.Module:
    """Return the submodule at :func:`network_path`.

    >>> find_network(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    Linear(in_features=2, out_features=3, bias=True)
    """
    return unwrapped(module.get_submodule(network_path(module, path)))


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside of what ``torch.compile`` gave: the names inside are those of the network itself.

    >>> unwrapped(nn.ReLU())
    ReLU()
    """
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def select_weights(
    network: nn.Module,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    trainable: bool = True,
    attention: bool = False,
    embeddings: bool = False,
) -> dict[str, nn.Parameter]:
    """Return the weights of the linear and convolution layers that the patterns choose, by name, in module order.

    A pattern is a glob over the layer's qualified name (``"layer1.*"``), or the name of its class (``"Conv2d"``).
    Biases and norms are never selected. A weight that two layers share is listed once, under its first name.

    Args:
        network: The network; names are relative to it.
        include: Layers that match any of these are taken.
        exclude: Layers that match any of these are left out, whatever ``include`` says.
        trainable: Refuse frozen layers: they would be changed all the same.
        attention: Take the input projections of attention layers too (``"self_attn.in_proj_weight"``); their output
            projection is a linear layer of its own.
        embeddings: Take embeddings too; one that is tied to a chosen layer's weight goes under the layer's name.

    Returns:
        Qualified parameter name (``"conv1.weight"``) to parameter.

    Raises:
        ValueError: If a pattern matches no layer, if nothing is selected, or if a layer is frozen or not built yet.

    >>> list(select_weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)), exclude=["Conv2d"]))
    ['2.weight']
    """
    kinds = (*WEIGHTED, *[nn.MultiheadAttention] * attention, *[nn.Embedding] * embeddings)
    included = _matching(network, include, kinds, argument="include")
    excluded = _matching(network, exclude, kinds, argument="exclude")
    chosen = {name: layer for name, layer in included.items() if name not in excluded}
    of_layers = {id(layer.weight) for layer in chosen.values() if isinstance(layer, WEIGHTED)}
    selected: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, layer in chosen.items():
        if isinstance(layer, nn.Embedding) and id(layer.weight) in of_layers:
            continue
        for key in _PROJECTIONS if isinstance(layer, nn.MultiheadAttention) else ("weight",):
            if getattr(layer, key) is None:
                continue
            weight = _checked(name, layer, key, trainable=trainable)
            if id(weight) not in seen:
                seen.add(id(weight))
                selected[f"{name}.{key}" if name else key] = weight
    if not selected:
        raise ValueError(
            f"include={list(include)} without exclude={list(exclude)} must leave a layer of {list(included)[:6]}"
        )
    return selected


def check_built(network: nn.Module) -> None:
    """Raise a ValueError if a layer of the network is lazy and has not seen a batch yet."""
    for name, layer in network.named_modules():
        _check_built(name, layer)


def select_layers(network: nn.Module, patterns: Sequence[str], *, argument: str) -> dict[str, Layer]:
    """Return the linear and convolution layers that any of the patterns matches, by name, in module order.

    Args:
        network: The network; names are relative to it.
        patterns: Globs over qualified names, or names of classes, as in :func:`select_weights`.
        argument: What the caller calls them.

    Raises:
        ValueError: If a pattern matches no layer, or the patterns are one string.

    >>> list(select_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)), ["Linear"], argument="keep"))
    ['2']
    """
    chosen = _matching(network, patterns, WEIGHTED, argument=argument)
    return {name: layer for name, layer in chosen.items() if isinstance(layer, WEIGHTED)}


def _matching(
    network: nn.Module, patterns: Sequence[str], kinds: tuple[type[nn.Module], ...], *, argument: str
) -> dict[str, nn.Module]:
    if isinstance(patterns, str):
        raise ValueError(f"{argument} must be a list of patterns, got the string {patterns!r}: write [{patterns!r}]")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}
    for pattern in patterns:
        if not any(_matches(name, layer, pattern) for name, layer in layers.items()):
            raise ValueError(_no_match(argument, pattern, layers))
    return {name: layer for name, layer in layers.items() if any(_matches(name, layer, p) for p in patterns)}


def _matches(name: str, layer: nn.Module, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or type(layer).__name__ == pattern


def _no_match(argument: str, pattern: str, layers: dict[str, nn.Module]) -> str:
    known = [*layers, *sorted({type(layer).__name__ for layer in layers.values()})]
    near = difflib.get_close_matches(pattern, known, n=3)
    hint = f"nearest: {near}" if near else f"the layers are {list(layers)[:6]}"
    return f"{argument} must match a linear or convolution layer, got {pattern!r}, which matches none; {hint}"


def _check_built(name: str, layer: nn.Module) -> None:
    if any(isinstance(parameter, UninitializedParameter) for parameter in layer.parameters(recurse=False)):
        raise ValueError(
            f"layer {name!r} must be built before it is compressed: run one batch through the network first"
        )


def _checked(name: str, layer: nn.Module, key: str, *, trainable: bool) -> nn.Parameter:
    """Return a weight of a layer if it can be compressed."""
    weight = getattr(layer, key)
    if is_parametrized(layer, key) or not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"layer {name!r} must hold its weight as a parameter, got one that is computed from others (weight_norm,"
            " spectral_norm, torch.nn.utils.prune or a parametrization): take that off first"
            " (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm,"
            " torch.nn.utils.prune.remove), or add the layer to exclude"
        )
    _check_built(name, layer)
    if isinstance(layer, nn.Embedding) and (layer.sparse or layer.max_norm is not None):
        raise ValueError(
            f"embedding {name!r} must have sparse=False and max_norm=None, got {layer.sparse} and {layer.max_norm}: its"
            " gradients are averaged as dense ones, and its rows may not change in a call; add it to exclude"
        )
    if trainable and not weight.requires_grad:
        raise ValueError(f"layer {name!r} must be trainable, its weight is frozen: unfreeze it or add it to exclude")
    return weight
