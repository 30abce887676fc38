"""A network that computes with fake-quantized numbers, and the int8 network that comes of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_edge.surgery.batchnorm import scale_and_shift_, scale_weights_
from lightning_edge.surgery.capture import capture, export_graph, keep_random_state
from lightning_edge.surgery.captured import CapturedNetwork, WeightBits, captured_of
from lightning_edge.surgery.conversion import remove_training_
from lightning_edge.surgery.fakequant import insert_fake_quantizers_
from lightning_edge.surgery.pooling import keep_positions_
from lightning_edge.surgery.quantizers import WEIGHT_BITS
from lightning_edge.surgery.selection import WEIGHTED, select_layers

__all__ = ["CapturedNetwork", "capture_", "convert", "deployed", "release_", "release_if_captured_"]


def capture_(
    network: nn.Module,
    example_inputs: Any,
    *,
    observers: Mapping[str, Tensor] | None = None,
    frozen: bool = False,
    keep: Sequence[str] = (),
    weight_bits: WeightBits = 8,
    learned_steps: bool = False,
) -> CapturedNetwork:
    """Let the network compute with fake-quantized numbers from now on, sharing its tensors, and return what does it.

    Quantized are, in torchao's scheme for XNNPACK (PT2E): the weights of convolutions (1-D, 2-D) and linear layers, to
    int8 in -127..127, symmetric per output channel, with the range of the weights of the moment, and with a batch norm
    that follows taken into account; their inputs and outputs, and those of sums, products and average pools, to int8
    per tensor with a moving average of the ranges seen. Everything else stays in float.

    Args:
        network: The plain network. Only its ``forward`` is replaced, on the instance; :func:`release_` puts it back.
        example_inputs: A tuple of positional inputs or a dict of them by name, batch first; the batch size is free
            afterwards, other sizes are not, and the network is called with as many of them.
        observers: A state of :meth:`CapturedNetwork.observer_state` to go on from.
        frozen: Whether these were frozen.
        keep: Globs over names of layers, or names of their classes, that stay in float. What their neighbours make or
            read is an integer as ever.
        weight_bits: 8, 4, or globs over names of layers to these, the first match counting and 8 where none matches.
            Weights of 4 bits are the integers -7..7, kept in int8: the file is smaller where it is entropy-coded, the
            runtime computes with the kernels that it has. They start clipped where their squared error is smallest.
        learned_steps: Let the sizes of all steps be learned (Esser et al. 2020, arXiv:1902.08153); what learns is
            :class:`~lightning_edge.surgery.learned_steps.LearnedSteps`.

    Raises:
        ValueError: If the network is captured already, cannot be captured, or has nothing to quantize, if a pattern
            matches no layer, or a number of bits is not 8 or 4.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1))
    >>> sorted(capture_(network, (torch.zeros(2, 4),)).observers)
    ['0.weight', 'input_1', 'linear']
    """
    if captured_of(network) is not None:
        raise ValueError(
            f"network must be a plain one, got a {type(network).__name__} that is quantized already:"
            " lightning_edge.release_(network) puts its plain forward back"
        )
    # Lightning evaluates in inference mode, in which a checkpoint that is tested is captured: what is made there could
    # never be trained.
    with keep_random_state(), torch.inference_mode(False), torch.enable_grad():
        graph_module, literals = capture(network, example_inputs)
        kept = [f"{name}.weight".removeprefix(".") for name in select_layers(network, keep, argument="keep")]
        bits = bits_of_weights(network, weight_bits)
        pairs = scale_weights_(graph_module, keep=kept)
        names = insert_fake_quantizers_(graph_module, pairs, keep=kept, bits=bits, learned=learned_steps)
        captured = CapturedNetwork(
            network,
            graph_module,
            literals=literals,
            pairs={layer.name: norm.name for layer, norm in pairs.items()},
            observers=names,
            keep=tuple(keep),
            weight_bits=weight_bits,
            learned_steps=learned_steps,
        )
        if observers is None:
            captured.observe_weights(example_inputs)
        else:
            captured.load_observer_state(observers, frozen=frozen)
    network.forward = captured
    return captured


def bits_of_weights(network: nn.Module, weight_bits: WeightBits) -> dict[str, int]:
    """Return the bits of each weight of a linear or convolution layer, by its name.

    Raises:
        ValueError: If a number of bits is not 8 or 4, or a pattern matches no layer.

    >>> bits_of_weights(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"0": 8, "*": 4})
    {'0.weight': 8, '1.weight': 4}
    """
    if not any(isinstance(layer, WEIGHTED) for layer in network.modules()):
        return {}  # refused where the quantizers are inserted
    if not isinstance(weight_bits, int | Mapping):
        raise ValueError(
            f"weight_bits must be one of {WEIGHT_BITS}, or a mapping from globs to them, got {weight_bits!r}"
        )
    wanted = {"*": weight_bits} if isinstance(weight_bits, int) else dict(weight_bits)
    for pattern, bits in wanted.items():
        if bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits must be one of {WEIGHT_BITS}, got {bits!r} for {pattern!r}")
    found: dict[str, int] = {}
    for pattern, bits in wanted.items():
        for name in select_layers(network, [pattern], argument="weight_bits"):
            found.setdefault(f"{name}.weight".removeprefix("."), bits)
    return found


def release_(network: nn.Module) -> None:
    """Put the plain forward back.

    Raises:
        ValueError: If the network is not captured.

    >>> network = nn.Linear(4, 3)
    >>> captured = capture_(network, (torch.zeros(2, 4),)); release_(network); network(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """
    if captured_of(network) is None:
        raise ValueError(f"network must be captured, got a plain {type(network).__name__}: call capture_ first")
    del vars(network)["forward"]


def release_if_captured_(network: nn.Module) -> None:
    """Put the plain forward back where there is another."""
    if captured_of(network) is not None:
        release_(network)


def deployed(network: nn.Module, example_inputs: Any, *, split_norms: bool = True) -> GraphModule:
    """Return the graph that an exporter writes, in evaluation mode: of a captured network the int8 one, else the plain.

    The plain one's weights are the network's own, bit for bit.

    Args:
        network: Plain or captured; not changed.
        example_inputs: As :func:`capture_` takes them.
        split_norms: Make each batch norm of a plain network a scale and a shift.

    Raises:
        ValueError: If the network cannot be traced, or its observers have seen no data.

    >>> deployed(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), (torch.zeros(2, 2),))(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """
    if captured_of(network) is not None:
        graph_module = convert(network)
        keep_positions_(graph_module)
        return graph_module
    graph_module = export_graph(network, example_inputs, training=False)
    if split_norms:
        scale_and_shift_(graph_module)
    remove_training_(graph_module)
    keep_positions_(graph_module)
    graph_module.training = False
    return graph_module


def convert(network: nn.Module | CapturedNetwork) -> GraphModule:
    """Return the int8 network in evaluation mode: integer weights, quantized activations, batch norms folded.

    The live network is not changed and shares nothing with the result. Zeros of the weights are zeros in the integers,
    and k distinct values of a layer are at most k integers per output channel, since scales are symmetric and per
    channel.

    Args:
        network: A captured network, or what :func:`capture_` returned for it.

    Raises:
        ValueError: If the network is not captured, or its observers have seen no data.
    """
    captured = network if isinstance(network, CapturedNetwork) else captured_of(network)
    if captured is None:
        raise ValueError(f"network must be captured, got a plain {type(network).__name__}: call capture_ first")
    return captured.convert()
