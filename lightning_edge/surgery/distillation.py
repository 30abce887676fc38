"""What a network computes on its way: outputs of named layers, of teacher and student alike."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.selection import unwrapped
from lightning_edge.surgery.taps import tap_


@dataclass
class Call:
    """One call of a network."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    features: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of the layers that are looked at, by qualified name."""
    learns: bool = True
    """Whether gradients are computed of it."""
    taught: list["Call"] = field(default_factory=list)
    """What each teacher gives for the same inputs."""

    @property
    def rows(self) -> int:
        """How many rows the inputs have: those of their first tensor."""
        inputs = tree_leaves((self.args, self.kwargs))
        return next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), 1)


@contextmanager
def recorded(
    network: nn.Module, layers: Sequence[str] = (), *, first: Callable[[Call], object] | None = None
) -> Iterator[list[Call]]:
    """Record every call of the network while the context is open: inputs, output, and the outputs of some layers.

    Inputs and features are copies, as they were before a layer like ``nn.ReLU(inplace=True)`` changed them. Gradients
    flow through features and output. Nothing stays in the network afterwards, but for a network under
    quantization-aware training, whose layers do not run as modules: its graph gets further outputs, which cost nothing.

    Args:
        network: As it is called; one that ``torch.compile`` wraps may have no ``layers``, its insides are not called.
        layers: Qualified names of layers inside of it, of which each gives a tensor (or a tuple that begins with one).
        first: Is told of every call that learns, before the network runs.

    Raises:
        ValueError: If a layer gives no tensor.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with recorded(network, ["0"]) as calls: _ = network(torch.zeros(4, 2))
    >>> calls[0].features["0"].shape, calls[0].output.shape
    (torch.Size([4, 3]), torch.Size([4, 3]))
    """
    calls: list[Call] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map_only(Tensor, _copy, (args, kwargs))
        calls.append(Call(args, kwargs, learns=torch.is_grad_enabled()))
        if first is not None and calls[-1].learns:
            first(calls[-1])

    def end(_: nn.Module, __: object, output: object) -> None:
        calls[-1].output = output

    with ExitStack() as stack:
        stack.enter_context(_through_all_layers())
        stack.enter_context(network.register_forward_pre_hook(begin, with_kwargs=True))
        for name, layer in _layers(network, layers).items():

            def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
                feature = first_tensor(output, what=f"layer {name!r}", mend="match another layer")
                calls[-1].features[name] = feature.clone()

            stack.enter_context(layer.register_forward_hook(keep))
        stack.enter_context(network.register_forward_hook(end))
        yield calls


def match_layers(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return pairs of qualified names: of a layer of the student, and of the teacher's that it learns from.

    In a glob ``*`` stands for a part of one name: ``"layer*"`` is ``layer1`` and ``layer2``, not ``layer1.0``.

    Args:
        student: The network that learns.
        teacher: The network that teaches.
        layers: Names or globs of the student, to names or globs of the teacher; both must match equally many, which are
            paired in the order of the modules.

    Raises:
        ValueError: If a name matches nothing, with the nearest names; if the numbers differ.

    >>> match_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 5)), {"0": "0"})
    [('0', '0')]
    """
    pairs: list[tuple[str, str]] = []
    for ours, theirs in layers.items():
        own, other = _matching(student, ours, "student"), _matching(teacher, theirs, "teacher")
        if len(own) != len(other):
            raise ValueError(
                f"layers must match equally many layers of student and teacher, got {ours!r} with {own} and"
                f" {theirs!r} with {other}"
            )
        pairs.extend(zip(own, other, strict=True))
    return pairs


@torch.no_grad()
def handed_on(network: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> list[str]:
    """Return which of the layers give nothing but what they get: a captured graph has no trace of these.

    Args:
        network: Called once, in the mode that it is in.
        layers: Qualified names of layers inside of it.
        inputs: What the network is called with.

    >>> handed_on(nn.Sequential(nn.Identity(), nn.Linear(2, 2)), ["0", "1"], (torch.zeros(1, 2),))
    ['0']
    """
    found: list[str] = []
    with ExitStack() as stack, recorded(network):
        for name in layers:

            def compare(_: nn.Module, args: tuple[object, ...], output: object, name: str = name) -> None:
                if args and output is args[0]:
                    found.append(name)

            stack.enter_context(network.get_submodule(name).register_forward_hook(compare))
        network(*inputs)
    return found


def first_tensor(output: object, *, what: str = "output", mend: str = "give output_adapter") -> Tensor:
    """Return the tensor that an output is, or begins with.

    Args:
        output: Of a network or a layer.
        what: What an error calls it.
        mend: What an error advises.

    Raises:
        ValueError: If there is none.

    >>> first_tensor((torch.ones(1), None))
    tensor([1.])
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"{what} must give a tensor to be matched, got a {type(output).__name__}: {mend}")
    return first


@contextmanager
def _through_all_layers() -> Iterator[None]:
    """Keep a transformer from its path for inference: it passes its layers by, and cuts off what is padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone()


def _layers(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    inner = unwrapped(network)
    captured = captured_of(inner)
    if captured is not None:
        return {name: tap_(captured.graph_module, name) for name in names}
    return {name: inner.get_submodule(name) for name in names}


def _matching(network: nn.Module, pattern: str, whose: str) -> list[str]:
    names = [name for name, _ in unwrapped(network).named_modules() if name]
    found = [name for name in names if _matches(name.split("."), pattern.split("."))]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3) or names[:4]
        raise ValueError(
            f"layers must name layers of the {whose}, got {pattern!r}, which matches none; nearest: {near}"
        )
    return found


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
