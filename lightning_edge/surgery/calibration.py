"""Batches from whatever holds data, and the ranges of a captured network's activations from them."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_edge.surgery.capture import keep_random_state, training_flags
from lightning_edge.surgery.captured import CapturedNetwork
from lightning_edge.surgery.observers import RangeObserver, observer_factory

BATCHES = 16


def calibration_inputs(
    calibration: Any, network: nn.Module, *, batches: int | None = BATCHES, progress: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the network's positional inputs of each batch, on its device.

    Of a batch that is a tuple or a list, as many elements are inputs as the ``forward`` has positional parameters
    without a default: of ``(images, labels)`` the images, for a network of one input. A tuple in the first place,
    ``((left, right), labels)``, is taken for the inputs.

    Args:
        calibration: An iterable of batches, or a data module: what has a ``train_dataloader``, after ``setup("fit")``.
        network: Decides about inputs and device.
        batches: How many, at least 1; None takes all.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no batch, or one holds no tensors, or values that are not finite.

    >>> [inputs[0].shape for inputs in calibration_inputs([(torch.zeros(8, 4), torch.zeros(8))], nn.Linear(4, 2))]
    [torch.Size([8, 4])]
    """
    if batches is not None and batches < 1:
        raise ValueError(f"batches must be at least 1, or None for all, got {batches}")
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    count = _input_count(network)
    index = -1
    shown = track(enumerate(islice(_loader(calibration), batches)), "calibration", total=batches, disable=not progress)
    for index, batch in shown:
        inputs = _inputs(batch, count)
        for value in inputs:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"calibration must hold finite values, got NaN or infinity in batch {index}")
        yield tuple(value.to(device) for value in inputs)
    if index < 0:
        raise ValueError("calibration must hold at least one batch, got none: is the iterator used up?")


@torch.no_grad()
def calibrate_(
    captured: CapturedNetwork,
    inputs: Iterable[tuple[Tensor, ...]],
    *,
    observer: str | Callable[[], RangeObserver] = "histogram",
) -> None:
    """Set the ranges of all activations from what the network computes in float, in evaluation mode; then freeze them.

    Args:
        captured: From :func:`~lightning_edge.surgery.quantization.capture_`; the ranges of weights are those that it
            set, batch norms do not move.
        inputs: Positional inputs of each batch, as :func:`calibration_inputs` yields them.
        observer: A name of :data:`~lightning_edge.surgery.observers.OBSERVERS`, or a callable that makes an observer.

    Raises:
        ValueError: If there is no batch, no such observer, or an activation that is not finite.
    """
    make = observer_factory(observer)
    seen = {name: make() for name, quantizer in captured.observers.items() if not quantizer.is_per_channel}

    def observe(name: str, values: Tensor) -> None:
        if name in seen:
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"activations must be finite in calibration, got NaN or infinity at {name!r}")
            seen[name].observe(values)

    with training_flags(captured.network, False), captured.in_float(observe):
        for batch in inputs:
            captured(*batch)
    for name, watching in seen.items():
        captured.set_range(name, *watching.range())
    captured.freeze_observers()


def _loader(calibration: Any) -> Iterator[Any]:
    """Iterate as if nobody had: shuffling draws from the global generator, which gets its state back."""
    with keep_random_state():
        if hasattr(calibration, "train_dataloader"):
            for hook in ("prepare_data", "setup"):
                if hasattr(calibration, hook):
                    getattr(calibration, hook)(*(["fit"] if hook == "setup" else []))
            calibration = calibration.train_dataloader()
        if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
            raise ValueError(
                f"calibration must be an iterable of batches or a data module, got a {type(calibration).__name__}:"
                " for one batch write [batch]"
            )
        yield from calibration


def _input_count(network: nn.Module) -> int | None:
    """How many positional inputs the network needs; None for as many as there are."""
    parameters = list(inspect.signature(type(network).forward).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(item.kind in positional and item.default is inspect.Parameter.empty for item in parameters)


def _inputs(batch: Any, count: int | None) -> tuple[Tensor, ...]:
    values = batch if isinstance(batch, list | tuple) else (batch,)
    if values and isinstance(values[0], list | tuple):
        values = values[0]
    inputs = tuple(values[:count])
    if not inputs or len(inputs) < (count or 1) or not all(isinstance(value, Tensor) for value in inputs):
        raise ValueError(
            f"a batch of calibration must be a tensor, or a tuple that starts with the network's {count or 1} input"
            f" tensors, got {type(batch).__name__} of {[type(value).__name__ for value in values][:4]}"
        )
    return inputs
