"""Scores of weights without data: how much flows through each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.outputs import flat_tensors


def synflow_scores(
    network: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], example_inputs: tuple[Any, ...]
) -> dict[str, Tensor]:
    """Return w dR/dw for R, the sum of the outputs of the network of absolute weights for an input of ones.

    Tanaka et al. 2020 (arXiv:2006.05467), equation 1 and algorithm 1. Computed in double precision on a copy, in
    evaluation mode, with the running statistics of batch norms left out; normalized to a sum of 1, which float32 holds.
    Of a network with several outputs (tuples, mappings), all count.

    Args:
        network: Not changed.
        weights: The weights that are scored, by name.
        masks: Which of them are still there.
        example_inputs: Shapes and types alone matter.

    Returns:
        float32 scores of the weights' shapes, at least 0; 0 where the mask is False.

    Raises:
        ValueError: If nothing flows from the inputs to the outputs.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad(): _ = layer.weight.copy_(torch.tensor([[-3.0, 1.0]]))
    >>> synflow_scores(layer, dict(layer.named_parameters()), {}, (torch.zeros(1, 2),))
    {'weight': tensor([[0.7500, 0.2500]])}
    """
    flow = copied(network).double().eval().requires_grad_(True)
    flow.__dict__.pop("forward", None)  # of a network under quantization-aware training, the plain one
    with torch.no_grad():
        for layer in flow.modules():
            if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.zero_()
                layer.running_var.fill_(1.0)
        for name, parameter in flow.named_parameters(remove_duplicate=False):
            parameter.abs_()
            if name in masks:
                parameter.mul_(masks[name])
    ones = tuple(
        torch.ones_like(v[:1], dtype=torch.float64) if v.is_floating_point() else v[:1] for v in example_inputs
    )
    with torch.enable_grad():
        outputs = [tensor for tensor in flat_tensors(flow(*ones)) if tensor.requires_grad]
        if not outputs:
            raise ValueError("score 'synflow' must find a flow from inputs to outputs, got no output with a gradient")
        total = torch.stack([tensor.sum() for tensor in outputs]).sum()
        chosen = {name: flow.get_parameter(name) for name in weights}
        gradients = torch.autograd.grad(total, list(chosen.values()), allow_unused=True)
    scores = {
        name: torch.zeros_like(w) if gradient is None else (w.detach() * gradient).abs()
        for (name, w), gradient in zip(chosen.items(), gradients, strict=True)
    }
    whole = sum(float(score.sum()) for score in scores.values())
    if not 0.0 < whole < float("inf"):
        raise ValueError(f"score 'synflow' must find a flow from inputs to outputs, got {whole}: is a layer all zero?")
    return {name: (score / whole).float() for name, score in scores.items()}
