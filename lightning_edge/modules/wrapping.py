"""A LightningModule inside of another, which lends it every hook that it does not need itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden

_STEPS = (
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_gradient_clipping",
    "backward",
    "optimizer_zero_grad",
    "lr_scheduler_step",
)


def lend_hooks_(outer: L.LightningModule, inner: L.LightningModule) -> None:
    """Give the outer module every hook that the inner one overrides and it does not: Lightning calls the outer's.

    What the inner module has on its own instance counts too. A deep copy of the outer module calls its own inner copy.
    """
    kinds = (ModelHooks, DataHooks, CheckpointHooks)
    names = [name for kind in kinds for name in vars(kind) if not name.startswith("_")]
    for name in (*names, *_STEPS):
        if is_overridden(name, inner) and not is_overridden(name, outer):
            hook = partial(_call, outer, inner, name)
            hook.__wrapped__ = getattr(inner, name)  # type: ignore[attr-defined]  # Lightning reads its signature
            setattr(outer, name, hook)


@contextmanager
def speaking_for(outer: L.LightningModule, inner: L.LightningModule) -> Iterator[None]:
    """Let the inner module log: Lightning tells the outer one alone which hook is running."""
    previous, inner._current_fx_name = inner._current_fx_name, outer._current_fx_name
    try:
        yield
    finally:
        inner._current_fx_name = previous


def _call(outer: L.LightningModule, inner: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> Any:
    with speaking_for(outer, inner):
        return getattr(inner, name)(*args, **kwargs)
