"""What a network is called with: seen at its first call, kept in checkpoints as shapes and types."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten, treespec_dumps, treespec_loads
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from lightning_edge.surgery.calls import Arguments, arguments_of, as_arguments, call_during
from lightning_edge.surgery.capture import keep_random_state, training_flags

_FREE = -1  # the batch
_LOGS = ("log", "log_dict")
_LABELS = ("label", "labels", "target", "targets", "y")


class NetworkInputs:
    """Shapes (without the batch), types and nesting of a network's inputs; what is no tensor is kept as it is.

    >>> inputs = NetworkInputs()
    >>> inputs.remember(Arguments((torch.zeros(8, 3), True))); inputs.state()["leaves"]
    [([-1, 3], 'float32'), True]
    """

    def __init__(self, state: Mapping[str, Any] | tuple[()] = ()) -> None:
        self._seen = dict(state)
        self._network: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: numbers and strings."""
        return dict(self._seen)

    def watch(self, network: nn.Module) -> None:
        """Look at the next call of the network, once; the sanity check of a fit is early enough."""
        if not self._seen and self._handle is None:
            self._network = network
            self._handle = network.register_forward_pre_hook(self._look, with_kwargs=True)

    def take_from(self, pl_module: L.LightningModule, batch: Any) -> None:
        """Take what the module calls the watched network with, unless a call was seen already.

        That is for its ``example_input_array``, else for this batch in its ``training_step``, which is cut off there.

        Raises:
            ValueError: If the network is not called.
        """
        if self._seen:
            return
        assert self._network is not None, "watch comes first"
        example = pl_module.example_input_array
        if example is None:
            inputs = call_in_step(pl_module, self._network, "training_step", batch)
        else:
            args, named = ((), example) if isinstance(example, dict) else (example, {})
            args = args if isinstance(args, tuple) else (args,)
            inputs = called(pl_module, self._network, lambda: pl_module(*args, **named), by="example_input_array")
        self._forget_watch()
        self.remember(inputs)

    def remember(self, inputs: Arguments) -> None:
        """Keep shapes, types and nesting.

        Raises:
            ValueError: If there is no tensor with a batch dimension, or something that a checkpoint cannot keep.
        """
        leaves, structure = tree_flatten([[*inputs], {**inputs.named}])
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor | bool | int | float | str | None)]
        if others or not any(value.ndim for value in inputs.tensors):
            raise ValueError(
                "the network's inputs must be tensors, with a batch first, and constants, got"
                f" {[type(leaf).__name__ for leaf in leaves]}: choose another network="
            )
        rows = inputs.rows
        self._seen = {
            "structure": treespec_dumps(structure),
            "leaves": [_described(leaf, rows) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        }

    def example(self, device: torch.device, *, generator: torch.Generator | None = None) -> Arguments:
        """Return inputs of two rows (a batch of one would become a constant of a traced graph).

        Args:
            device: Where they go.
            generator: Draws normal numbers for the real inputs; without one, and for whole numbers, they are zero.
        """
        leaves = [
            _made(leaf[0], leaf[1], generator).to(device) if isinstance(leaf, list | tuple) else leaf
            for leaf in self._seen["leaves"]
        ]
        args, named = tree_unflatten(leaves, treespec_loads(self._seen["structure"]))
        return Arguments.of(args, named)

    def _look(self, network: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if network is not self._network or torch.compiler.is_compiling():  # a copy that is measured, or a trace
            return
        self._forget_watch()
        self.remember(arguments_of(network, args, named))

    def _forget_watch(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def check_has_forward(network: nn.Module) -> None:
    """Raise a ValueError if the network cannot be called: a module of several children that has no ``forward``.

    >>> check_has_forward(nn.ReLU())
    """
    if type(network).forward in (nn.Module.forward, L.LightningModule.forward):
        children = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
        raise ValueError(
            f"network must have a forward, got {type(network).__name__}, which has none: name the child that is the"
            f" network by network=, one of {children}"
        )


def call_in_step(
    pl_module: L.LightningModule, network: nn.Module, step: str, batch: Any, *, loader: int = 0
) -> Arguments:
    """Return what a step of the module calls the network with for this batch; the step is cut off there.

    Args:
        pl_module: On the batch's device. It runs in evaluation mode without gradients, and is left as it was.
        network: Inside of it.
        step: ``"training_step"`` or ``"validation_step"``.
        batch: As the step takes it.
        loader: Index of the data loader that it comes from.

    Raises:
        ValueError: If the step does not call the network.
    """
    run = getattr(pl_module, step)
    known = {"batch_idx": 0, "dataloader_idx": loader}
    further = {name: value for name, value in known.items() if name in signature(run).parameters}
    if "batch_idx" not in further and len(signature(run).parameters) > 1:  # under another name
        return called(pl_module, network, lambda: run(batch, 0), by=step)
    return called(pl_module, network, lambda: run(batch, **further), by=step)


def training_calls(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    network: nn.Module,
    *,
    batches: int | None,
    seed: int,
    progress: bool = False,
) -> list[Arguments]:
    """Return what ``training_step`` calls the network with for batches of the training data, the same on every rank.

    Args:
        trainer: Of the fit.
        pl_module: Left as it was.
        network: Inside of it.
        batches: How many; None for all.
        seed: Of the data's order, whatever was drawn before; the random state is left as it was.
        progress: Show a progress bar.
    """
    loader = _apart(trainer.fit_loop._data_source.dataloader())  # as the user gave it, not this rank's share
    device = next(network.parameters()).device
    with keep_random_state():
        torch.manual_seed(seed)
        given = (batch for batch, *_ in loader)
        shown = track(islice(given, batches), "calibration", total=batches, disable=not progress)
        moved = (pl_module._apply_batch_transfer_handler(batch, device=device) for batch in shown)
        return [call_in_step(pl_module, network, "training_step", batch) for batch in moved]


def _apart(loaders: Any) -> CombinedLoader:
    """Return one or several loaders, as Lightning combines them, whose iteration leaves that of the fit alone."""
    mode: Any = "max_size_cycle"
    if isinstance(loaders, CombinedLoader):
        loaders, mode = loaders.iterables, loaders._mode

    def twin(loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            return loader
        found = copy.copy(loader)
        found._iterator = None  # of the workers that persist
        return found

    return CombinedLoader(tree_map(twin, loaders), mode)


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch: whole numbers in the second place, or under their usual name; None without.

    >>> labels_of({"image": torch.zeros(2, 3), "label": torch.tensor([1, 0])})
    tensor([1, 0])
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def called(pl_module: L.LightningModule, network: nn.Module, run: Callable[[], object], *, by: str) -> Arguments:
    """Return what ``run`` calls the network with.

    Args:
        pl_module: Put into evaluation mode for it.
        network: Inside of it.
        run: Calls it.
        by: What that is, for the message.

    Raises:
        ValueError: If it does not.
    """
    with torch.no_grad(), keep_random_state(), training_flags(pl_module, False), _no_logging(pl_module):
        inputs = call_during(network, run)
    if inputs is None:
        children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
        raise ValueError(
            f"{by} of {type(pl_module).__name__} must call the network, a {type(network).__name__}, got no call of it:"
            f" name the network that is called by network=, one of {children}"
        )
    return as_arguments(network, inputs)


@contextmanager
def _no_logging(pl_module: L.LightningModule) -> Iterator[None]:
    """Let the module log nothing: a step that runs outside of its loop has nowhere to log to."""
    for name in _LOGS:
        vars(pl_module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in _LOGS:
            del vars(pl_module)[name]


def _described(tensor: Tensor, rows: int) -> tuple[list[int], str]:
    shape = list(tensor.shape)
    if shape and shape[0] == rows:
        shape[0] = _FREE
    return shape, str(tensor.dtype).removeprefix("torch.")


def _made(shape: list[int], dtype: str, generator: torch.Generator | None) -> Tensor:
    sizes, kind = [2 if size == _FREE else size for size in shape], getattr(torch, dtype)
    if generator is None or not kind.is_floating_point:
        return torch.zeros(sizes, dtype=kind)
    return torch.randn(sizes, generator=generator).to(kind)
