"""Quantization after training: a network that computes with few bits, from a trained one and a few batches."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import Any, cast, get_args

import torch
from torch import nn

from lightning_edge.surgery.calibration import BATCHES, calibrate_, calibration_inputs
from lightning_edge.surgery.calls import Arguments
from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.integer_linear import LinearScheme, integer_linear_
from lightning_edge.surgery.observers import RangeObserver
from lightning_edge.surgery.quantization import capture_
from lightning_edge.surgery.selection import select_layers

TARGETS = ("onnxruntime", "xnnpack")
FILES: dict[str, tuple[str, ...]] = {
    "int8_static": (".onnx", ".pte", ".edge"),
    "int8_dynamic": (".onnx", ".edge"),
    "int8_weight_only": (".onnx", ".pte", ".edge"),
    "int4_weight_only": (".onnx", ".pte", ".edge"),
    "fp16": (".onnx", ".pte", ".edge"),
    "bf16": (".onnx", ".edge"),
}
"""The schemes, and the files that each can be exported to."""
SCHEME = "quantization_scheme"
"""The attribute that says how a network was quantized, where its forward does not."""
_ROUNDED = {"fp16": torch.float16, "bf16": torch.bfloat16}


def quantize(
    module: nn.Module,
    calibration: Any = None,
    *,
    scheme: str = "int8_static",
    target: str = "onnxruntime",
    observer: str | Callable[[], RangeObserver] = "histogram",
    keep: Sequence[str] = (),
    group_size: int = 32,
    batches: int | None = BATCHES,
    progress: bool = False,
) -> nn.Module:
    """Return a copy of the network, in evaluation mode, that computes with quantized numbers.

    * ``"int8_static"``: weights to int8 per output channel, activations to int8 with ranges from the calibration (Jacob
      et al. 2018, arXiv:1712.05877), see :func:`~lightning_edge.surgery.quantization.capture_`. ``export`` writes what
      :func:`~lightning_edge.surgery.quantization.convert` makes of it, and onnxruntime and ExecuTorch give the very
      numbers of that; those of the copy, whose biases are not rounded, differ here and there by one step.
    * ``"int8_dynamic"``: weights of linear layers to int8, and each row of their inputs to int8 with its own scale
      while it runs, by torchao; in onnxruntime integer products.
    * ``"int8_weight_only"``, ``"int4_weight_only"``: weights of linear layers to int8 with a scale per output, or to
      int4 with one for each ``group_size`` weights, by torchao; computation in float32. An ``.onnx`` stores a byte or
      half a byte of each; onnxruntime unpacks them as it loads, ExecuTorch at every call, which is slow.
    * ``"fp16"``, ``"bf16"``: weights rounded to that precision, computation in float32; an ``.onnx`` and a ``.edge``
      store two bytes of each. A ``.pte`` in ``"fp16"`` computes in float16, fast where the processor does (ARMv8.2,
      AVX512-FP16), slow elsewhere; it stores two bytes for each weight of a linear layer, and four for those of
      convolutions, as ExecuTorch wants them. XNNPACK has no bfloat16.

    :data:`FILES` says which scheme can be exported to which file. A copy of scheme ``"int8_static"`` takes inputs of
    any batch, and else of the sizes of the first batch of the calibration.

    Args:
        module: The trained network; not changed.
        calibration: Batches for ``"int8_static"``: an iterable of tensors, of tuples that begin with the network's
            inputs (a DataLoader), or of dicts with the inputs by name; or a data module, whose training data is taken.
        scheme: One of :data:`FILES`.
        target: ``"onnxruntime"`` or ``"xnnpack"`` (ExecuTorch): one calibration serves both, it is only checked.
        observer: How the range of an activation is chosen from the values seen: ``"minmax"``, ``"moving_average"``,
            ``"percentile"``, ``"histogram"`` (smallest squared error), or a callable that makes an observer.
        keep: Globs over names of layers, or names of their classes, that stay in float;
            :func:`~lightning_edge.surgery.quantization_sensitivity.quantization_sensitivity` finds which.
        group_size: Of ``"int4_weight_only"``; must divide the inputs of every linear layer.
        batches: How many batches are looked at; None for all.
        progress: Show a progress bar.

    Raises:
        ValueError: If an argument is unknown, a pattern matches no layer, there is no calibration data, the network is
            quantized already or not in float32, or it cannot be captured.

    >>> network = quantize(nn.Linear(4, 3), [torch.randn(8, 4)]); network(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """
    if scheme not in FILES:
        raise ValueError(f"scheme must be one of {list(FILES)}, got {scheme!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {list(TARGETS)}, got {target!r}")
    if scheme == "int8_static" and calibration is None:
        raise ValueError("calibration must be given for the scheme 'int8_static', got None: a few training batches")
    _check_float(module)
    with torch.inference_mode(False):  # what is made in inference mode can neither be traced nor trained
        network = copied(module).eval()
        kept = set(select_layers(network, keep, argument="keep").values())
        if scheme in _ROUNDED:
            _round_(network, _ROUNDED[scheme], keep=kept)
        elif scheme in get_args(LinearScheme):
            integer_linear_(network, cast(LinearScheme, scheme), group_size=group_size, keep=kept)
        else:
            inputs = calibration_inputs(calibration, network, batches=batches, progress=progress)
            _capture_and_calibrate_(network, inputs, observer, keep)
            return network
    vars(network)[SCHEME] = scheme
    return network


def check_exportable(module: nn.Module, suffix: str) -> str | None:
    """Return the scheme that a network was quantized with, None if with none, if it can be written to such a file.

    Raises:
        ValueError: With the files that it can be written to.

    >>> check_exportable(nn.Linear(2, 2), ".onnx")
    """
    scheme = vars(module).get(SCHEME)
    if scheme is not None and suffix not in FILES[scheme]:
        can = [name for name, files in FILES.items() if suffix in files]
        raise ValueError(
            f"path must end in one of {list(FILES[scheme])} for a network quantized with scheme {scheme!r}, got"
            f" {suffix!r}, which takes the schemes {can}"
        )
    return None if scheme is None else str(scheme)


def _check_float(module: nn.Module) -> None:
    if captured_of(module) is not None or SCHEME in vars(module):
        raise ValueError(f"module must be a network in float, got a {type(module).__name__} that is quantized already")
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ValueError(
                f"module must have its weights in float32, got {weight.dtype} in {name!r}: module.float() converts them"
            )


def _capture_and_calibrate_(
    network: nn.Module,
    inputs: Iterator[Arguments],
    observer: str | Callable[[], RangeObserver],
    keep: Sequence[str],
) -> None:
    first = next(inputs)
    calibrate_(capture_(network, first, keep=keep), chain([first], inputs), observer=observer)


@torch.no_grad()
def _round_(network: nn.Module, dtype: torch.dtype, *, keep: Collection[nn.Module]) -> None:
    for name, layer in network.named_modules():
        for key, parameter in layer.named_parameters(recurse=False) if layer not in keep else ():
            if parameter.is_floating_point():
                rounded = parameter.to(dtype)
                if bool((rounded.isinf() & parameter.isfinite()).any()):
                    raise ValueError(
                        f"weights must be at most {torch.finfo(dtype).max:g} in magnitude to be rounded to {dtype}, got"
                        f" {parameter.abs().max():g} in {f'{name}.{key}'.lstrip('.')}: name its layer by keep="
                    )
                parameter.copy_(rounded)
