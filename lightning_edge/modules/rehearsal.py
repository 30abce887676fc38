"""What is tried before a fit: terms that look into layers, beside the callbacks that change these."""

import lightning as L
import torch
from torch import Tensor, nn

from lightning_edge.modules.matching import Matching
from lightning_edge.surgery.capture import keep_random_state, training_flags
from lightning_edge.surgery.distillation import handed_on


def rehearse(module: L.LightningModule, matching: Matching, network: nn.Module) -> None:
    """Make the adapters, try the terms, and refuse layers that a callback of the trainer will take away.

    Args:
        module: In a trainer, with its data at hand.
        matching: Of this module, built.
        network: The student's.

    Raises:
        ValueError: If there are no inputs to be found for adapters, or a term or layer cannot work.
    """
    try:
        inputs = _inputs(module, network)
    except ValueError:
        if matching.needs_adapters:
            raise
        return  # the first step tries these terms
    matching.rehearse(network, inputs)
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
        for name in matching.terms_with_adapters:
            # The callbacks are asked by what they have: they are a layer beside this one.
            narrows = getattr(callback, "narrows", None)
            narrowed = narrows(network, matching.layers_of(name), inputs) if narrows else []
            if narrowed:
                raise ValueError(
                    f"losses[{name!r}] must match layers that keep their width, got {narrowed}, of which"
                    f" {type(callback).__name__} removes channels: add the layer to its exclude, match another one, or"
                    " compare by 'similarity', 'relational' or 'attention'"
                )
        if getattr(callback, "technique", None) == "quantization":
            _check_captured(matching, network, inputs)


def _check_captured(matching: Matching, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with training_flags(network, False), keep_random_state():
        empty = handed_on(network, matching.layers, inputs)
    if empty:
        raise ValueError(
            f"losses must match layers that compute something, got {empty}, which hand on what they get: under"
            " QuantizationAwareTraining there is nothing of them in the graph; match the layer in front"
        )


def _inputs(module: L.LightningModule, network: nn.Module) -> tuple[Tensor, ...]:
    """Return two rows for the network: of ``example_input_array``, else of what a training batch has first."""
    example = module.example_input_array
    if example is None:
        batch = module.trainer.strategy.batch_to_device(_first_batch(module), dataloader_idx=0)
        example = batch[0] if isinstance(batch, list | tuple) else batch
    values = tuple(example) if isinstance(example, list | tuple) else (example,)
    for value in values:
        if not isinstance(value, Tensor):
            raise ValueError(_no_example(module, f"a batch begins with a {type(value).__name__}"))
    device = next(module.parameters()).device
    inputs = tuple(value[:2].to(device) for value in values if isinstance(value, Tensor))
    try:
        with training_flags(network, False), keep_random_state(), torch.no_grad():
            network(*inputs)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        reason = f"the network cannot be called with {'it' if example is module.example_input_array else 'a batch'}"
        raise ValueError(_no_example(module, f"{reason} as it is ({error})")) from error
    return inputs


def _first_batch(module: L.LightningModule) -> object:
    """Return a batch, and leave the loader's own generators as they were."""
    loader = module.trainer.fit_loop._data_source.dataloader()
    kept = [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]
    states = [(generator, generator.get_state()) for generator in kept if isinstance(generator, torch.Generator)]
    with keep_random_state():
        batch: object = next(iter(loader))
    for generator, state in states:
        generator.set_state(state)
    return batch


def _no_example(module: L.LightningModule, reason: str) -> str:
    return (
        f"example_input_array of {type(getattr(module, 'student', module)).__name__} must be set to inputs of the"
        f" network, a tensor or a tuple of them, since {reason}: the adapters need the sizes of its features"
    )
