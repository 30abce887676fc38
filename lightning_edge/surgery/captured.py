"""A network's forward, run with fake-quantized numbers through a graph beside it."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_edge.surgery.batchnorm import fold_, scale_and_shift_
from lightning_edge.surgery.calls import Arguments, arguments_of, as_arguments
from lightning_edge.surgery.capture import ModeLiteral, copy_graph, set_literal, tensor_at, training_flags
from lightning_edge.surgery.conversion import replace_fake_quantizers_
from lightning_edge.surgery.exact_scales import odd_multiples, odd_requantization
from lightning_edge.surgery.fakequant import requantized
from lightning_edge.surgery.quantizer_state import has_range, load_state_, ranges_of, set_range_, set_ranges_, state_of
from lightning_edge.surgery.quantizers import Quantizer, WeightQuantizer
from lightning_edge.surgery.taps import remove_taps_

WeightBits = int | Mapping[str, int]
"""Bits of all weights, or of those whose layer's name a glob matches, the first match counting."""
_Tensors = dict[str, Tensor | None]  # of one module: its parameters or its buffers


class CapturedNetwork:
    """The forward of a network, run through a fake-quantized graph that shares its parameters and buffers.

    It stands in the network's ``forward`` (:func:`capture_` puts it there) and is no submodule: names, checkpoints,
    optimizers and DDP see the plain network. At every call it follows the network: the ``training`` flag of each module
    (which Lightning sets without calling ``train()``), its device, and tensors that were replaced. In training the
    observers follow the data and the weights, until :meth:`freeze_observers`; in evaluation nothing changes and the
    numbers are those of the int8 network. A deep copy of the network gets its own copy of this.
    """

    def __init__(
        self,
        network: nn.Module,
        graph_module: GraphModule,
        *,
        literals: tuple[ModeLiteral, ...],
        pairs: Mapping[str, str],
        observers: Mapping[str, str],
        keep: tuple[str, ...] = (),
        weight_bits: WeightBits = 8,
        learned_steps: bool = False,
    ) -> None:
        self.network = network
        self.graph_module = graph_module
        self.keep, self.weight_bits, self.learned_steps = keep, weight_bits, learned_steps
        self.observers_frozen = False
        self._rounding, self._norms_frozen = True, False
        self._only: frozenset[str] | None = None
        self._literals = literals
        self._pairs = dict(pairs)
        self._observers = dict(observers)
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._owners: list[nn.Module] = []
        self._links: list[tuple[_Tensors, _Tensors, str]] = []
        self._flags: tuple[bool, ...] | None = None
        self._device: torch.device | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return the network's output, from fake-quantized weights and activations.

        Under autocast training computes in few bits; evaluation does not: its numbers are those of the integer file.
        """
        inputs = arguments_of(self.network, args, kwargs)
        self._follow()
        if self.network.training or self._device is None:
            return self._run(inputs)
        with torch.autocast(self._device.type, enabled=False):
            return self._run(inputs.map(_single))

    def _run(self, inputs: Arguments) -> object:
        try:
            return self.graph_module(*inputs, **inputs.named)
        except (AssertionError, ValueError) as error:
            # torch's checks of sizes and of nesting
            if not str(error).startswith("Guard failed") and "TreeSpec" not in str(error):
                raise
            sizes = [tuple(value.shape) for value in inputs.tensors]
            raise ValueError(
                f"inputs of a quantized {type(self.network).__name__} must have the sizes, beside that of the batch,"
                f" and the nesting that it was captured with, got {sizes} ({str(error).splitlines()[0][:200]}): pad or"
                " resize them, and give the same arguments at every call"
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> "CapturedNetwork":
        network = copy.deepcopy(self.network, memo)
        twin = CapturedNetwork(
            network,
            copy_graph(self.graph_module, memo),
            literals=self._literals,
            pairs=self._pairs,
            observers=self._observers,
            keep=self.keep,
            weight_bits=self.weight_bits,
            learned_steps=self.learned_steps,
        )
        twin.observers_frozen = self.observers_frozen
        twin._rounding, twin._norms_frozen, twin._only = self._rounding, self._norms_frozen, self._only
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Callable[..., object], tuple[nn.Module, str]]:
        """Pickle the plain forward: hyperparameters that hold the network travel in plain checkpoints."""
        warnings.warn(
            f"the pickle of a quantized {type(self.network).__name__} holds its plain forward: the observers are in the"
            " checkpoints of QuantizationAwareTraining, and export() writes the quantized network",
            stacklevel=2,
        )
        return getattr, (self.network, "forward")

    @property
    def observers(self) -> dict[str, Quantizer]:
        """The fake quantizers: a weight's has the name of the parameter, an activation's that of its operator."""
        return {name: cast(Quantizer, self.graph_module.get_submodule(path)) for name, path in self._observers.items()}

    @property
    def rounding(self) -> bool:
        """Whether numbers are rounded; without it observers watch the network in float."""
        return self._rounding

    @rounding.setter
    def rounding(self, value: bool) -> None:
        if value != self._rounding:
            self._rounding, self._flags = value, None

    @property
    def norms_frozen(self) -> bool:
        """Whether batch norms use, and keep, their running statistics in training."""
        return self._norms_frozen

    @norms_frozen.setter
    def norms_frozen(self, value: bool) -> None:
        if value != self._norms_frozen:
            self._norms_frozen, self._flags = value, None

    @property
    def norms(self) -> dict[str, str]:
        """The batch norm behind each layer that has one, by names of nodes in the graph."""
        return dict(self._pairs)

    @property
    def calibrated(self) -> bool:
        """Whether every observer has seen data; until then activations pass unquantized in evaluation."""
        return all(has_range(quantizer) for quantizer in self.observers.values())

    @torch.no_grad()
    def observe_weights(self, example_inputs: Any) -> None:
        """Set the ranges of the weights from the weights as they are now; those of activations stay as they are.

        An evaluation before the first training step then has them too.
        """
        with training_flags(self.network, False):
            self._follow()
            for quantizer in self.observers.values():
                quantizer.enable_observer(quantizer.is_per_channel)
                quantizer.fixed = quantizer.fixed and not quantizer.is_per_channel
            inputs = as_arguments(self.network, example_inputs).map(lambda value: value.to(self._device))
            self.graph_module(*inputs, **inputs.named)
        self._flags = None

    @contextmanager
    def in_float(self, observe: Callable[[str, Tensor], None] | None = None) -> Iterator[None]:
        """Compute with plain numbers for a while: no observer updates, nothing is rounded.

        Args:
            observe: Called at every value that would be quantized, with its observer's name.
        """
        self._follow()
        quantizers = self.observers
        for quantizer in quantizers.values():
            quantizer.disable_observer()
            quantizer.disable_fake_quant()
        handles = [
            quantizer.register_forward_pre_hook(_told(observe, name))
            for name, quantizer in quantizers.items()
            if observe is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._flags = None

    @contextmanager
    def quantizing_only(self, names: Iterable[str]) -> Iterator[None]:
        """Quantize for a while the values of these observers alone."""
        self._only, self._flags = frozenset(names), None
        try:
            yield
        finally:
            self._only, self._flags = None, None

    def values_of_layers(self) -> dict[str, tuple[str, str, str]]:
        """Return the names of the observers of each quantized layer's input, weight and output, by the layer's name."""
        names = {path: name for name, path in self._observers.items()}
        found = [tuple(names[path] for path in paths) for paths in requantized(self.graph_module, self._pairs)]
        return {weight.rpartition("weight")[0].removesuffix("."): (data, weight, out) for data, weight, out in found}

    def follow_codebooks(self) -> None:
        """Round shared weights by their shared values as these are at the next call, as a conversion does."""
        for quantizer in self.observers.values():
            if isinstance(quantizer, WeightQuantizer):
                quantizer.follow_codebook()

    def freeze_observers(self) -> None:
        """Keep the ranges from here on, with scales that every runtime rounds alike.

        See :mod:`lightning_edge.surgery.exact_scales`; freezing twice is freezing once.

        Raises:
            ValueError: If an observer has seen no data.
        """
        self._check_calibrated("frozen")
        remove_taps_(self.graph_module)  # what looks at a layer would hide what follows it
        activations = [quantizer for quantizer in self.observers.values() if not quantizer.is_per_channel]
        scales = odd_multiples(torch.cat([quantizer.scale for quantizer in activations]))
        for quantizer, scale in zip(activations, scales, strict=True):
            quantizer.scale.fill_(scale)
        for paths in requantized(self.graph_module, self._pairs):
            data, weight, output = (tensor_at(self.graph_module, f"{path}.scale") for path in paths)
            weight.copy_(odd_requantization(weight, input_scale=float(data), output_scale=float(output)))
        self.observers_frozen, self._flags = True, None
        self.follow_codebooks()

    def observer_state(self) -> dict[str, Tensor]:
        """Return ranges, scales and zero points as copies, by observer name."""
        return state_of(self.observers)

    def load_observer_state(self, state: Mapping[str, Tensor], *, frozen: bool = False) -> None:
        """Take over the ranges of :meth:`observer_state`, whatever the shapes were.

        Args:
            state: Of this network's observers.
            frozen: Whether they were frozen.

        Raises:
            ValueError: If names are missing or too many.
        """
        load_state_(self.observers, state)
        self.observers_frozen, self._flags = frozen, None

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Return all minima and all maxima as two vectors, for ranks to agree on their minimum and maximum."""
        self._follow()
        return ranges_of(self.observers)

    @torch.no_grad()
    def set_ranges(self, minima: Tensor, maxima: Tensor) -> None:
        """Take the vectors of :meth:`ranges` back, and recompute scales and zero points from them.

        Raises:
            ValueError: If the sizes differ from those that :meth:`ranges` gave.
        """
        set_ranges_(self.observers, minima, maxima)
        self._flags = None

    @torch.no_grad()
    def set_range(self, name: str, low: Tensor, high: Tensor) -> None:
        """Set the range of one observer, and recompute its scale and zero point.

        Args:
            name: Of :attr:`observers`.
            low: Minimum, of the shape that the observer has.
            high: Maximum, as ``low``.
        """
        set_range_(self.observers[name], low, high)
        self._flags = None

    def convert(self) -> GraphModule:
        """Return the int8 network in evaluation mode, see :func:`convert`."""
        self._check_calibrated("converted")
        self._follow()
        graph_module = copy_graph(self.graph_module)
        remove_taps_(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        for literal in self._literals:
            set_literal(nodes[literal.node], literal.argument, literal.in_evaluation)
        fold_(graph_module, self._pairs)
        scale_and_shift_(graph_module)
        replace_fake_quantizers_(graph_module)
        graph_module.training = False
        return graph_module

    def _follow(self) -> None:
        if not self._owners:  # not when it is made: in a deep copy, the network's own copy is still empty then
            owners = (self.network.get_submodule(literal.owner) for literal in self._literals)
            self._owners = list(dict.fromkeys([self.network, *owners]))
            self._links = list(_links(self.network, self.graph_module))
        for source, target, key in self._links:
            if target[key] is not source[key]:
                target[key] = source[key]
        device = next((tensor.device for source, _, key in self._links if (tensor := source[key]) is not None), None)
        if device is not None and device != self._device:
            self.graph_module.to(device)
            self._move_constants(device)
            self._device = device
        flags = tuple(module.training for module in self._owners)
        if flags != self._flags:
            self._switch(dict(zip(self._owners, flags, strict=True)))
            self._flags = flags

    def _switch(self, training: Mapping[nn.Module, bool]) -> None:
        for literal in self._literals:
            owner = self.network.get_submodule(literal.owner)
            mode = training[owner] and not (self._norms_frozen and isinstance(owner, _BatchNorm))
            value = literal.in_training if mode else literal.in_evaluation
            set_literal(self._nodes[literal.node], literal.argument, value)
        self.graph_module.recompile()
        observing = self.network.training and not self.observers_frozen
        for name, quantizer in self.observers.items():
            quantizer.fixed = self.observers_frozen
            quantizer.enable_observer(observing)
            wanted = self._rounding and (self._only is None or name in self._only)
            quantizer.enable_fake_quant(wanted and (observing or has_range(quantizer)))
        if self.observers_frozen:
            for paths in requantized(self.graph_module, self._pairs):
                data, output = (float(tensor_at(self.graph_module, f"{path}.scale")) for path in paths[::2])
                weight = self.graph_module.get_submodule(paths[1])
                assert isinstance(weight, WeightQuantizer)
                weight.around = data, output

    def _move_constants(self, device: torch.device) -> None:
        for node in self._nodes.values():
            if node.op == "get_attr":
                owner, _, leaf = str(node.target).rpartition(".")
                constants = vars(self.graph_module.get_submodule(owner))
                if isinstance(constants.get(leaf), Tensor):  # neither a parameter nor a buffer: a literal of forward
                    constants[leaf] = constants[leaf].to(device)
            elif isinstance(node.kwargs.get("device"), torch.device) and node.kwargs["device"] != device:
                node.update_kwarg("device", device)
                self._flags = None

    def _check_calibrated(self, verb: str) -> None:
        blank = [name for name, quantizer in self.observers.items() if not has_range(quantizer)]
        if blank:
            raise ValueError(
                f"observers must have seen data before they are {verb}, got none at {blank[:3]}: "
                "run a batch in training mode first"
            )


def captured_of(network: nn.Module) -> CapturedNetwork | None:
    """Return what stands in the network's forward, None for the plain one.

    >>> captured_of(nn.Linear(2, 2))
    """
    forward = vars(network).get("forward")
    return forward if isinstance(forward, CapturedNetwork) else None


def _links(network: nn.Module, graph_module: GraphModule) -> Iterator[tuple[_Tensors, _Tensors, str]]:
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, part in graph_module.named_modules(remove_duplicate=False):
        if name not in modules:
            continue
        for group in ("_parameters", "_buffers"):
            source, target = vars(modules[name])[group], vars(part)[group]
            yield from ((source, target, key) for key in target if key in source)


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _told(observe: Callable[[str, Tensor], None], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: observe(name, inputs[0])
