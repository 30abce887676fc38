"""Batches from whatever holds data, and the ranges of a captured network's activations from them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_edge.surgery.calls import BY_POSITION, Arguments, as_arguments
from lightning_edge.surgery.capture import keep_random_state, training_flags
from lightning_edge.surgery.captured import CapturedNetwork
from lightning_edge.surgery.observers import RangeObserver, observer_factory

BATCHES = 16


def calibration_inputs(
    calibration: Any, network: nn.Module, *, batches: int | None = BATCHES, progress: bool = False
) -> Iterator[Arguments]:
    """Yield what the network is called with for each batch, on its device.

    A batch that is a dict holds the inputs by their names in ``forward``, and whatever else; without any of these
    names it is itself the input. Of a tuple or a list, ``(images, labels)``, as many elements are inputs as ``forward``
    has parameters without a default; a tuple in the first place, ``((left, right), labels)``, holds them all.

    Args:
        calibration: An iterable of batches, or a data module: what has a ``train_dataloader``, after ``setup("fit")``.
        network: Decides about inputs and device.
        batches: How many, at least 1; None takes all.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no batch, or one holds no tensors, values that are not finite, or elements that may be
            inputs or not: ``forward`` has parameters with defaults for them.

    >>> [inputs[0].shape for inputs in calibration_inputs([(torch.zeros(8, 4), torch.zeros(8))], nn.Linear(4, 2))]
    [torch.Size([8, 4])]
    """
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise ValueError(f"batches must be a whole number, at least 1, or None for all, got {batches!r}")
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    index = -1
    shown = track(enumerate(islice(_loader(calibration), batches)), "calibration", total=batches, disable=not progress)
    for index, batch in shown:
        inputs = inputs_of(batch, network)
        if inputs.rows == 0:
            raise ValueError(f"calibration must hold batches of at least one row, got none in batch {index}")
        for value in inputs.tensors:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"calibration must hold finite values, got NaN or infinity in batch {index}")
        yield inputs.map(lambda value: value.to(device))
    if index < 0:
        raise ValueError("calibration must hold at least one batch, got none: is the iterator used up?")


@torch.no_grad()
def calibrate_(
    captured: CapturedNetwork,
    inputs: Iterable[tuple[Any, ...]],
    *,
    observer: str | Callable[[], RangeObserver] = "histogram",
    freeze: bool = True,
) -> None:
    """Set the ranges of all activations from what the network computes in float, in evaluation mode; then freeze them.

    Args:
        captured: From :func:`~lightning_edge.surgery.quantization.capture_`; the ranges of weights are those that it
            set, batch norms do not move.
        inputs: What the network is called with for each batch, as :func:`calibration_inputs` yields it.
        observer: A name of :data:`~lightning_edge.surgery.observers.OBSERVERS`, or a callable that makes an observer.
        freeze: Without it the ranges are where training begins.

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
            arguments = as_arguments(captured.network, batch, argument="inputs")
            captured(*arguments, **arguments.named)
    for name, watching in seen.items():
        captured.set_range(name, *watching.range())
    if freeze:
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


def inputs_of(batch: Any, network: nn.Module) -> Arguments:
    """Return the inputs of a batch, as :func:`calibration_inputs` says."""
    parameters = list(inspect.signature(type(network).forward).parameters.values())[1:]
    names = [item.name for item in parameters]
    if isinstance(batch, Mapping):
        takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)
        named = {name: value for name, value in batch.items() if takes_any or name in names}
        return as_arguments(network, named or (batch,), argument="a batch of calibration")
    values = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if values and isinstance(values[0], list | tuple):
        values = tuple(values[0])
    elif not any(item.kind is inspect.Parameter.VAR_POSITIONAL for item in parameters):
        positional = [item for item in parameters if item.kind in BY_POSITION]
        needed = max(1, sum(item.default is inspect.Parameter.empty for item in positional))
        if needed < len(values) <= len(positional):
            optional = [item.name for item in positional[needed : len(values)]]
            raise ValueError(
                f"a batch of calibration must say what {optional} are, got a tuple of {len(values)} for"
                f" {type(network).__name__}, which may be inputs or targets: write (inputs, targets) with a tuple of"
                " inputs, or a dict by name"
            )
        values = values[:needed]
    return as_arguments(network, values, argument="a batch of calibration")
