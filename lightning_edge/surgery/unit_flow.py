"""Which tensors of a run depend on the data through units alone: followed through operations that are known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_edge.surgery.coupling import ChannelGroup
from lightning_edge.surgery.outputs import flat_tensors
from lightning_edge.surgery.selection import WEIGHTED
from lightning_edge.surgery.slicing import is_depthwise

# Names of operations, by what they do to units. Those of the second group act on all dimensions behind the second.
# fmt: off
_ELEMENTWISE = frozenset([
    "abs", "add", "batch_norm", "celu", "clamp", "clone", "contiguous", "detach", "div", "double", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "elu", "exp", "float", "gelu", "half", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "log", "logsigmoid", "maximum", "minimum", "mish", "mul", "neg", "pow", "prelu",
    "radd", "rdiv", "relu", "relu6", "rmul", "rpow", "rrelu", "rsqrt", "rsub", "rtruediv", "selu", "sigmoid",
    "silu", "softplus", "softsign", "sqrt", "square", "sub", "tanh", "to", "true_divide", "truediv",
])
_SPATIAL = frozenset([
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "instance_norm",
    "interpolate", "max_pool1d", "max_pool2d", "max_pool3d",
])
_RESHAPING = frozenset(["flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"])
_MOVING = frozenset(["chunk", "expand", "getitem", "movedim", "pad", "permute", "split", "transpose", "unbind"])
_REDUCING = frozenset(["amax", "amin", "mean", "sum"])
_JOINING = frozenset(["cat", "concat", "concatenate", "stack"])
_READING = frozenset(["bool", "float", "index", "int", "item", "numpy", "tolist"])
# fmt: on
_BATCH_NORM_TRAINING = 5  # the place of the argument


@dataclass(frozen=True)
class Units:
    """A tensor each of whose numbers is a function of one unit; ``axis`` is the dimension of the units, if known."""

    axis: int | None


Kind = Units | Literal["constant", "other", "mixed"]
"""``"other"``: depends on the data, but not through these units. ``"mixed"``: anything else."""


class UnitFlow(TorchFunctionMode):
    """Follows units through one run of a network: which tensors are functions of single units, whatever the data.

    That a channel is constant on an example proves nothing: it may be a product with a gate that is closed there. What
    passed only operations that act on every unit for itself, and no other data, is constant where its unit is. An
    operation that is not known makes its result "mixed".

    Args:
        constants: Parameters and buffers.
        inputs: Of the network.

    >>> unit, data = torch.ones(2, 3), torch.ones(2, 1)
    >>> with UnitFlow([], [data]) as flow:
    ...     flow.mark(unit, Units(axis=1))
    ...     kinds = flow.kind(unit.relu() + 1), flow.kind(unit * data)
    >>> kinds
    (Units(axis=1), 'mixed')
    """

    def __init__(self, constants: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._kinds: dict[int, Kind] = {}
        self._held: list[Tensor] = []  # so that no id is given away
        self.opaque = False
        """Whether the data became numbers or decisions of Python, which are not followed."""
        for tensor in constants:
            self.mark(tensor, "constant")
        for tensor in inputs:
            self.mark(tensor, "other")

    def mark(self, tensor: Tensor, kind: Kind) -> None:
        """Say what a tensor is."""
        self._kinds[id(tensor)] = kind
        self._held.append(tensor)

    def kind(self, tensor: Tensor) -> Kind:
        """Return what a tensor is."""
        return self._kinds.get(id(tensor), "mixed")

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run an operation and mark its results."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")  # "add" of add_, "rsub" of __rsub__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = [self.kind(tensor) for tensor in given]
        shapes = [tensor.shape for tensor in given]  # an operation in place may change them
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.mark(leaf, _outcome(name, args, kwargs, list(zip(kinds, shapes, strict=True)), leaf))
            elif name in _READING and any(kind != "constant" for kind in kinds):
                self.opaque = True
        return result


def _outcome(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], given: list[tuple[Kind, Sequence[int]]], result: Tensor
) -> Kind:
    """Return what the result of an operation is."""
    kinds = [kind for kind, _ in given]
    units = [(kind.axis, shape) for kind, shape in given if isinstance(kind, Units)]
    if "mixed" in kinds:
        return "mixed"
    if not units:
        return "other" if "other" in kinds else "constant"
    if name in _JOINING:
        return Units(axis=None)  # each part keeps what it is; the units are in theirs
    if "other" in kinds:
        return "mixed"
    axis, shape = units[0]
    if len(units) == 1 and name in _MOVING:
        return Units(axis=None)
    if len(units) == 1 and name in _RESHAPING:
        kept = axis is not None and list(shape[: axis + 1]) == list(result.shape[: axis + 1])
        return Units(axis if kept else None)
    if len(units) == 1 and name in _REDUCING:
        return _reduced(axis, len(shape), args, kwargs)
    if name == "batch_norm" and (args[_BATCH_NORM_TRAINING:] or [kwargs.get("training")])[0]:
        return "mixed"
    matching = axis is not None and all(a == axis and s[a] == shape[axis] for a, s in units)
    known = name in _ELEMENTWISE or (name in _SPATIAL and axis == 1)
    return Units(axis) if known and (len(units) == 1 or matching) else "mixed"


def _reduced(axis: int | None, ndim: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Kind:
    """Return what is left of units when other dimensions than theirs are reduced."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if axis is None or given is None:
        return "mixed"
    dims = {dim % ndim for dim in ([given] if isinstance(given, int) else given)}
    if axis in dims:
        return "mixed"
    keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    return Units(axis if keepdim else axis - sum(dim < axis for dim in dims))


class ConsumerView:
    """What the consumers of a group see of its units in one run of a network.

    Args:
        network: In evaluation mode; not changed.
        group: The units.
        example_inputs: What the network is called with.

    Attributes:
        ranges: Smallest and largest value of each input channel, by layer; of the layers whose inputs depend on the
            data through single units alone.
        norms: The batch norm that reads a layer's output directly.
    """

    def __init__(self, network: nn.Module, group: ChannelGroup, example_inputs: tuple[Any, ...]) -> None:
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.norms: dict[str, _BatchNorm] = {}
        self._mixed: set[str] = set()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is held, so that its id is not given away
        self._consumers = {side.layer for side in group.members if not side.is_output}
        self._producers = {side.layer for side in group.members if side.is_output}
        self._flow = UnitFlow([*network.parameters(), *network.buffers()], flat_tensors(example_inputs))
        handles = []
        for name, layer in network.named_modules():
            if isinstance(layer, WEIGHTED):
                handles.append(layer.register_forward_hook(partial(self._called, name), with_kwargs=True))
            elif isinstance(layer, _BatchNorm):
                handles.append(layer.register_forward_pre_hook(self._normalized, with_kwargs=True))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), self._flow:
            network(*example_inputs)
        for handle in handles:
            handle.remove()
        unknown = self._consumers if self._flow.opaque else self._mixed
        self.ranges = {name: seen for name, seen in self.ranges.items() if name not in unknown}

    def _called(self, name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        value = args[0] if args else kwargs["input"]
        linear = isinstance(layer, nn.Linear)
        if name in self._consumers:
            self._outputs[id(output)] = (name, output)
            given = value.flatten(0, -2) if linear else value.transpose(0, 1).flatten(1).T
            low, high = given.amin(0).float().cpu(), given.amax(0).float().cpu()
            before = self.ranges.get(name, (low, high))
            self.ranges[name] = (torch.minimum(low, before[0]), torch.maximum(high, before[1]))
            if not isinstance(self._flow.kind(value), Units):
                self._mixed.add(name)
        kind: Kind = "other"  # what a layer makes of units are others
        if name in self._producers:
            kind = self._flow.kind(value) if is_depthwise(layer) else Units(output.ndim - 1 if linear else 1)
        self._flow.mark(output, kind)

    def _normalized(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        found = self._outputs.get(id(args[0] if args else kwargs["input"]))
        if found is not None:
            assert isinstance(layer, _BatchNorm)
            self.norms[found[0]] = layer
