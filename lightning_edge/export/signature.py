"""The graph of a network as runtimes call it: tensors one by one, each with a name, whatever they were nested in."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from lightning_edge.surgery.calls import Arguments


def flatten_(graph_module: GraphModule, inputs: Arguments) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Let the graph take its input tensors by position and return one tensor or a tuple of them.

    Args:
        graph_module: From :func:`~lightning_edge.surgery.quantization.deployed`; changed in place.
        inputs: What it was traced with. What is no tensor in them is a constant of the graph and no input any more.

    Returns:
        The names of the inputs: those of the arguments, with those of the keys where they are nested. And the names of
        the outputs: the keys of a dict, joined by dots, else those of the operators that make them.

    >>> import torch
    >>> from lightning_edge.surgery.capture import export_graph
    >>> graph = export_graph(torch.nn.Linear(2, 3), (torch.zeros(2, 2),), training=False)
    >>> flatten_(graph, Arguments((torch.zeros(2, 2),)))
    (('input',), ('linear',))
    """
    graph = graph_module.graph
    leaves = tree_leaves([[*inputs], {**inputs.named}])
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            graph.erase_node(node)
    output = next(iter(graph.find_nodes(op="output")))
    made, spec = output.args[0], graph_module._out_spec
    assert spec is not None
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(spec.num_leaves)), spec))
    named = [(node, _name(path, node)) for (path, _), node in zip(paths, made, strict=True) if node is not None]
    nodes, names = zip(*named, strict=True)
    output.args = (nodes[0] if len(nodes) == 1 else nodes,)
    graph.set_codegen(CodeGen())
    graph_module._forward_pre_hooks.clear()  # torch.export's check of the nesting
    graph_module.recompile()
    return tuple(str(node.target) for node in graph.find_nodes(op="placeholder")), names


def named_tensors_of(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors that a network returned, by their keys where they are in a dict, else by their position.

    >>> import torch
    >>> list(named_tensors_of({"logits": torch.zeros(1), "parts": {"a": torch.ones(1)}}))
    ['logits', 'parts.a']
    """
    return {
        _keys(path) or str(index): leaf
        for index, (path, leaf) in enumerate(tree_flatten_with_path(outputs)[0])
        if isinstance(leaf, Tensor)
    }


def _name(path: tuple[Any, ...], node: Any) -> str:
    return _keys(path) or str(node.name)


def _keys(path: tuple[Any, ...]) -> str:
    """The way to a nested value, if a dict is on it."""
    if not any(isinstance(key, MappingKey) for key in path):
        return ""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", keystr((key,))))) for key in path)
