"""Further outputs of a captured graph: what its layers compute, which no longer run as modules."""

import torch
from torch import nn
from torch.fx import GraphModule, Node

_TAP = "tap_"


def tap_(graph_module: GraphModule, name: str) -> nn.Module:
    """Return a module in the graph that is called with the output of a layer, and returns it to nobody."""
    tap = _TAP + name.replace(".", "__")
    if tap not in dict(graph_module.named_children()):
        inside = [node for node in graph_module.graph.nodes if _is_inside(node, name)]
        if not inside:
            raise ValueError(f"layer {name!r} must be called by the network to be matched, got no operator of it")
        node = _rescaled(inside[-1])
        graph_module.add_submodule(tap, nn.Identity())
        with graph_module.graph.inserting_after(node):
            graph_module.graph.call_module(tap, (node,))
        graph_module.recompile()
    return graph_module.get_submodule(tap)


def remove_taps_(graph_module: GraphModule) -> None:
    """Take out of a graph what :func:`tap_` has put in."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(_TAP):
            graph_module.graph.erase_node(node)
            delattr(graph_module, str(node.target))
    graph_module.recompile()


def _is_inside(node: Node, name: str) -> bool:
    if node.op != "call_function" or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ):
        return False
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _rescaled(node: Node) -> Node:
    """Return where the true output is: a convolution in front of a batch norm computes with scaled weights."""
    users = list(node.users)
    scaled = (
        len(users) == 1 and users[0].target is torch.ops.aten.div.Tensor and not users[0].meta.get("nn_module_stack")
    )
    return users[0] if scaled else node
