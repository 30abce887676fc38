"""A network as a graph of operators that keeps sharing its tensors and can still be switched between its two modes."""

import copy
import inspect
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from lightning_edge.surgery.calls import Arguments, as_arguments, two_rows
from lightning_edge.surgery.capture_errors import capture_refusal

GUARDS = "_guards_fn"  # torch.export's check of the input sizes


@dataclass(frozen=True)
class ModeLiteral:
    """A constant in the graph that differs between training and evaluation, such as ``train`` of dropout."""

    node: str
    argument: int | str
    owner: str
    """Qualified name of the module whose ``training`` flag decides."""
    in_training: bool | int | float
    in_evaluation: bool | int | float


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Give the global generators of torch back the state they had: tracing a network may draw from them."""
    # `is_initialized` has no types.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def training_flags(network: nn.Module, training: bool) -> Iterator[None]:
    """Set every ``training`` flag for a while; put back each module's own: frozen norms differ from the rest."""
    flags = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _no_graph_in_the_log() -> Iterator[None]:
    """Keep back the graph that torch prints where it cannot go on; the error says where that is."""
    said = io.StringIO()
    with redirect_stderr(said):
        yield
    sys.stderr.write(said.getvalue())  # of the network's own, if all went well


def export_graph(network: nn.Module, example_inputs: Any, *, training: bool) -> GraphModule:
    """Return the network as a graph of ATen operators with a dynamic batch dimension.

    Args:
        network: Left as it was: flags, tensors and random state.
        example_inputs: A tuple of positional inputs or a dict of them by name, batch first, nested as the network takes
            them; every tensor with the first one's batch size has a dynamic batch, and what is no tensor is a constant.
        training: The mode that is traced.

    Returns:
        A graph whose parameters and buffers are the network's own objects, under its names.

    Raises:
        ValueError: If the network cannot be traced, with the layer and the line; the cause is chained.

    >>> export_graph(nn.Linear(2, 3), (torch.zeros(4, 2),), training=False)(torch.zeros(7, 2)).shape
    torch.Size([7, 3])
    """
    if hasattr(vars(network).get("forward"), "graph_module"):
        raise ValueError(f"network must compute in float, got a {type(network).__name__} that is quantized already")
    inputs = two_rows(as_arguments(network, example_inputs))
    batch = torch.export.Dim("batch", min=1)
    sizes = inputs.batched(lambda _: {0: batch})
    try:
        with training_flags(network, training), _no_graph_in_the_log():
            program = torch.export.export(network, (*inputs,), {**inputs.named}, dynamic_shapes=_bind(network, sizes))
            graph = program.module()
    except Exception as error:
        raise ValueError(capture_refusal(error, network)) from error
    assert isinstance(graph, GraphModule)
    _check_shared(network, graph)
    return graph


def capture(network: nn.Module, example_inputs: Any) -> tuple[GraphModule, tuple[ModeLiteral, ...]]:
    """Return the graph of the network in training mode, and what to change in it for evaluation.

    Both modes are traced and compared, operator by operator: a difference in a constant becomes a :class:`ModeLiteral`;
    any other cannot be switched and is refused.

    Raises:
        ValueError: If the network cannot be traced, or runs other operators in training than in evaluation, or a batch
            norm has no momentum.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    >>> capture(network, (torch.zeros(2, 2),))[1]
    (ModeLiteral(node='dropout', argument=2, owner='1', in_training=True, in_evaluation=False),)
    """
    for name, norm in network.named_modules():
        if isinstance(norm, _BatchNorm) and norm.momentum is None and norm.track_running_stats:
            raise ValueError(
                f"batch norms must have a momentum to be captured, got None (averages over all batches) in {name!r}:"
                " give it one, such as 0.1"
            )
    graph = export_graph(network, example_inputs, training=True)
    literals = tuple(_differences(graph, export_graph(network, example_inputs, training=False)))
    return graph, literals


def copy_graph(graph_module: GraphModule, memo: dict[int, object] | None = None) -> GraphModule:
    """Return a deep copy that runs on its own."""
    with warnings.catch_warnings():
        # Copying the input specification of an exported graph trips torch over its own deprecation.
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        return copy.deepcopy(graph_module, memo)


def set_literal(node: Node, argument: int | str, value: Argument) -> None:
    """Set one constant argument of a node, positional or by name."""
    if isinstance(argument, int):
        node.update_arg(argument, value)
    else:
        node.update_kwarg(argument, value)


def operand(node: Node, index: int = 0) -> Node:
    """Return an operand that the graph computes or reads; a constant in its place would be a mistake."""
    value = node.args[index]
    assert isinstance(value, Node)
    return value


def owner_of(node: Node) -> str:
    """Return the qualified name of the module that called this operator, ``""`` for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name they have."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def tensor_at(module: nn.Module, name: object) -> Tensor:
    """Return the parameter or buffer of that qualified name."""
    owner, _, leaf = str(name).rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def eliminate_dead_code_(graph: GraphModule) -> None:
    """Drop what nobody reads, except inputs and calls in place: a batch norm's counter is read by the next step."""
    graph.graph.eliminate_dead_code(_has_effect)
    graph.recompile()


def _has_effect(node: Node) -> bool:
    return node.op in {"placeholder", "output", "call_module"} or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def _bind(network: nn.Module, sizes: Arguments) -> dict[str, Any]:
    signature = inspect.signature(network.forward)
    bound = dict(signature.bind(*sizes, **sizes.named).arguments)
    for name, parameter in signature.parameters.items():
        if name in bound and parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise ValueError(f"it takes {sorted(bound[name])} by **{name}, which cannot be traced: give them names")
    return bound


def _check_shared(network: nn.Module, graph: GraphModule) -> None:
    mine = named_tensors(network)
    for name, tensor in named_tensors(graph).items():
        if name in mine and tensor is not mine[name]:
            raise ValueError(f"the captured graph must share the tensors of the network, got a copy of {name!r}")
        if isinstance(tensor, nn.Parameter) and name not in mine:
            raise ValueError(f"the captured graph must have no parameter of its own, got {name!r}")


def _differences(training: GraphModule, evaluation: GraphModule) -> Iterator[ModeLiteral]:
    calls = [node for node in training.graph.nodes if node.op == "call_function"]
    others = iter([node for node in evaluation.graph.nodes if node.op == "call_function"])
    twins: dict[Node, str] = {}
    for node in calls:
        if _is_counter(node, training):
            yield ModeLiteral(node.name, 1, owner_of(node), 1, 0)
            continue
        other = next(others, None)
        if other is None or node.target is not other.target:
            got = "nothing" if other is None else str(other.target)
            raise ValueError(_refusal(node, f"{node.target} in training and {got} in evaluation"))
        twins[node] = other.name
        yield from _literals(node, other, twins)
    left = next(others, None)
    if left is not None:
        raise ValueError(_refusal(left, f"nothing in training and {left.target} in evaluation"))


def _literals(node: Node, other: Node, twins: dict[Node, str]) -> Iterator[ModeLiteral]:
    if len(node.args) != len(other.args):
        _spell_out(node)
        _spell_out(other)
    pairs: list[tuple[int | str, object, object]] = []
    pairs += [(index, *pair) for index, pair in enumerate(zip(node.args, other.args, strict=True))]
    pairs += [(key, node.kwargs.get(key), other.kwargs.get(key)) for key in {**node.kwargs, **other.kwargs}]
    for argument, mine, theirs in pairs:
        if _spelled(mine, twins) == _spelled(theirs, {}):
            continue
        if not isinstance(mine, bool | int | float) or not isinstance(theirs, bool | int | float):
            raise ValueError(_refusal(node, f"other inputs of {node.target} in training than in evaluation"))
        yield ModeLiteral(node.name, argument, owner_of(node), mine, theirs)


def _spell_out(node: Node) -> None:
    """Append the defaults of the operator: tracing leaves out an argument at its default, as ``training=False``."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        rest = schema.arguments[len(node.args) :]
        spare = [item for item in rest if not item.kwarg_only and item.name not in node.kwargs]
        node.args = (*node.args, *(item.default_value for item in spare))


def _spelled(argument: object, twins: dict[Node, str]) -> list[object]:
    """An argument with nodes as names, those of the training graph as the names of their twins."""
    leaves, spec = tree_flatten(argument)
    return [spec, *(twins.get(leaf, leaf.name) if isinstance(leaf, Node) else leaf for leaf in leaves)]


def _is_counter(node: Node, graph: GraphModule) -> bool:
    """Whether this is a batch norm's ``num_batches_tracked += 1``, which evaluation leaves out."""
    if node.target is not torch.ops.aten.add_.Tensor or node.args[1:] != (1,):
        return False
    counter = node.args[0]
    return (
        isinstance(counter, Node) and counter.op == "get_attr" and str(counter.target).endswith("num_batches_tracked")
    )


def _refusal(node: Node, difference: str) -> str:
    return (
        f"a captured network must run the same operators in training and in evaluation, got {difference}, in module "
        f"{owner_of(node)!r}. Give it one path for both (a rate of zero, no branch), or leave it out by network=."
    )
