"""Why a network cannot be traced: where in it, and the way out that fits the cause."""

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])
_CHOOSE = "choose another network= that leaves this part out"
_DATA_DEPENDENT = ("data-dependent", "data dependent", "Could not guard", "Tensor.item", "aten._local_scalar_dense")
_FIXED = ("Constraints violated", "specialized it to be a constant", "must be specialized")


def capture_refusal(error: Exception, network: nn.Module) -> str:
    """Return the message for a network that torch could not trace.

    Args:
        error: What torch raised.
        network: Its modules give the place a name.

    >>> capture_refusal(TypeError("missing a required argument: 'mask'"), nn.ReLU())[:70]
    "ReLU cannot be captured as a graph: missing a required argument: 'mask"
    """
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{type(network).__name__} cannot be captured as a graph{_place(error, network)}: {cause}. {_advice(error)}"


def _advice(error: Exception) -> str:
    text = " ".join(str(link) for link in _chain(error))
    if any(mark in text for mark in _DATA_DEPENDENT):
        return (
            "It must be free of control flow that depends on values of tensors: rewrite that part with tensor"
            f" operations (torch.where), or {_CHOOSE}"
        )
    if any(mark in text for mark in _FIXED):
        found = re.search(r"constant \((\d+)\)", text)
        only = f", not {found[1]} rows alone" if found else ""
        return f"It must take a batch of any size{only}: take sizes from the inputs, not from constants, or {_CHOOSE}"
    if isinstance(error, TypeError) and "argument" in text:
        return "Call it with all the inputs that it needs, by position or by name"
    return f"It must be made of operators that torch.export knows: replace this one, or {_CHOOSE}"


def _place(error: BaseException, network: nn.Module) -> str:
    """The innermost layer and line of the user's that were running."""
    names = {id(module): name for name, module in network.named_modules()}
    layer = line = ""
    for frame, number in _frames(error):
        owner = frame.f_locals.get("self")
        file = frame.f_code.co_filename
        if id(owner) in names and names[id(owner)]:
            layer = f" in layer {names[id(owner)]!r}"
        if not file.startswith((_TORCH, _OURS, "<")) and id(owner) in names:
            source = linecache.getline(file, number).strip()
            line = f" at {Path(file).name}:{number}" + (f" ({source})" if source else "")
    return layer + line


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    for link in _chain(error):
        trace = link.__traceback__
        while trace is not None:
            yield trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
