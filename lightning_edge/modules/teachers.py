"""Networks that teach: frozen, in evaluation mode, outside of every module."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_edge.modules.teacher_cache import TeacherCache, teacher_key
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.distillation import Call, recorded
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.weights import load_weights_


@dataclass(frozen=True)
class MovingAverage:
    """The student's own exponential moving average as a teacher (Tarvainen and Valpola 2017, arXiv:1703.01780, eq. 2).

    Args:
        decay: Share of the average that stays at an optimizer step, in [0, 1).

    Raises:
        ValueError: If ``decay`` is out of its range.

    >>> MovingAverage(decay=0.99)
    MovingAverage(decay=0.99)
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")


TeacherSource = nn.Module | MovingAverage | str | Path | Callable[[], nn.Module]
Precision = Literal["32", "bf16"]


def pretrained(network: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Return the network with the weights of a file, as a node of a configuration builds a teacher.

    Args:
        network: Changed in place.
        checkpoint: See ``surgery.weights.load_weights_``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold weights of this network.

    >>> torch.save(nn.Linear(2, 1).state_dict(), "teacher.pt")
    >>> pretrained(nn.Linear(2, 1), "teacher.pt")
    Linear(in_features=2, out_features=1, bias=True)
    """
    load_weights_(network, checkpoint)
    return network


class Teachers:
    """One or several frozen networks. No module: optimizers, checkpoints, DDP and copies of the student see none.

    Args:
        sources: Each a network (or a LightningModule, whose network is taken), a callable that builds one, or the path
            of a checkpoint of the student's own architecture: the dense network that is compressed, or an earlier
            student (born-again networks, Furlanello et al. 2018, arXiv:1805.04770); or a :class:`MovingAverage`.
        weights: Share of each teacher; default: equal ones. They are divided by their sum.
        precision: In which they compute, ``"32"`` or ``"bf16"`` (by autocast); default: as the student does.
        cache: A folder where what they give is kept, see :class:`TeacherCache`; default: nothing is kept.

    Raises:
        ValueError: If there are no sources, the weights do not fit, the precision is unknown, or an average, which
            never gives the same again, is to be cached.
    """

    def __init__(
        self,
        sources: Sequence[TeacherSource],
        weights: Sequence[float] | None = None,
        *,
        precision: Precision | None = None,
        cache: str | Path | None = None,
    ) -> None:
        if not sources:
            raise ValueError("teacher must be at least one network, got an empty list")
        shares = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(sources) or min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(f"teacher_weights must be {len(sources)} numbers >= 0, not all zero, got {weights}")
        if precision not in (None, *get_args(Precision)):
            raise ValueError(f"teacher_precision must be one of {get_args(Precision)} or None, got {precision!r}")
        if cache is not None and any(isinstance(source, MovingAverage) for source in sources):
            raise ValueError(f"cache must be None with a MovingAverage, which changes at every step, got {cache!r}")
        self.shares = [share / sum(shares) for share in shares]
        self.networks: list[nn.Module] = []
        self.precision = precision
        self._folder = None if cache is None else Path(cache).expanduser()
        self._caches: dict[int, TeacherCache] = {}
        self._sources = list(sources)
        self._early: Mapping[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "Teachers":
        return self

    def build(self, student: nn.Module) -> None:
        """Build and load what is only named so far.

        Args:
            student: The student's network, whose architecture a checkpoint's path stands for.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If a source gives no network, or the student itself.
        """
        if not self.networks:
            self.networks = [_build(source, student) for source in self._sources]
            if self._early:
                self.load_averages(self._early, student)

    @torch.no_grad()
    def __call__(self, index: int, call: Call, layers: Sequence[str], *, device: torch.device) -> Call:
        """Return what one teacher gives for the inputs of the student's call, floating-point numbers as float32.

        It is in evaluation mode whatever else was called, and on the student's device.
        """
        network = self.networks[index]
        parameter = next(islice(network.parameters(), 1), None)
        if parameter is not None and parameter.device != device:
            network.to(device)
        if network.training:
            network.eval()
        # A student of other numbers (precision="bf16-true") is given inputs of its own kind.
        wanted = torch.float32 if parameter is None else parameter.dtype
        args, kwargs = tree_map_only(Tensor, partial(_as_floats, dtype=wanted), (call.args, call.kwargs))
        if self._folder is None:
            return self._compute(network, args, kwargs, layers, device)
        compute = partial(self._compute, network, args, kwargs, layers, device)
        return self._cache(index, layers).answer(args, kwargs, compute)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move the averages towards the student, after an optimizer step.

        A student whose shapes have changed, since channels were removed, is averaged anew.
        """
        for index, source in enumerate(self._sources):
            if not isinstance(source, MovingAverage):
                continue
            if self._reshaped(index, student):
                continue
            average, current = self.networks[index].state_dict(), student.state_dict()
            for name, value in current.items():
                if value.is_floating_point():
                    average[name].lerp_(value.to(average[name].device), 1 - source.decay)
                else:
                    average[name].copy_(value)

    def averages(self) -> dict[str, Tensor]:
        """Return the moving averages, for a checkpoint: no other teacher changes."""
        return {
            f"{index}.{name}": value.detach().clone()
            for index, source in enumerate(self._sources)
            if isinstance(source, MovingAverage) and self.networks
            for name, value in self.networks[index].state_dict().items()
        }

    def load_averages(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        """Take over what :meth:`averages` returned, of a student of these widths; now, or when they are built."""
        self._early = {} if self.networks else state
        for index, source in enumerate(self._sources if self.networks else ()):
            if isinstance(source, MovingAverage):
                self._reshaped(index, student)
                own = {n.removeprefix(f"{index}."): v for n, v in state.items() if n.startswith(f"{index}.")}
                self.networks[index].load_state_dict(own)

    def close_epoch(self, barrier: Callable[[], object]) -> None:
        """Write what the caches have learned, wait until every rank has, and read what the others wrote."""
        for cache in self._caches.values():
            cache.flush()
        if self._caches:
            barrier()
        for cache in self._caches.values():
            cache.close_epoch()

    def _compute(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: Sequence[str],
        device: torch.device,
    ) -> Call:
        with self._casting(device), recorded(network, layers) as calls:
            network(*args, **kwargs)
        float32 = partial(_as_floats, dtype=torch.float32)
        output, features = tree_map_only(Tensor, float32, (calls[0].output, calls[0].features))
        return Call(args, kwargs, output, features)

    def _casting(self, device: torch.device) -> AbstractContextManager[object]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _cache(self, index: int, layers: Sequence[str]) -> TeacherCache:
        if index not in self._caches:
            assert self._folder is not None
            key = teacher_key(self.networks[index], layers, precision=self.precision)
            self._caches[index] = TeacherCache(self._folder / key)
        return self._caches[index]

    def _reshaped(self, index: int, student: nn.Module) -> bool:
        """Copy the student anew if its shapes are not the average's any more; return whether they were not."""
        average = self.networks[index].state_dict()
        differs = any(average[name].shape != value.shape for name, value in student.state_dict().items())
        if differs:
            self.networks[index] = _build(self._sources[index], student)
        return differs


def _build(source: TeacherSource, student: nn.Module) -> nn.Module:
    """Return the frozen network that a source stands for."""
    if isinstance(source, str | Path | MovingAverage):
        network = copied(student)
        vars(network).pop("forward", None)  # of a student under quantization-aware training, the plain one
        if not isinstance(source, MovingAverage):
            load_weights_(network, source)
        return network.requires_grad_(False).eval()
    built = source if isinstance(source, nn.Module) else source()
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"teacher must be a network, a callable that builds one, or a path, got {type(built).__name__}"
        )
    network = find_network(built) if isinstance(built, L.LightningModule) else built
    if {id(parameter) for parameter in network.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError(
            f"teacher must have parameters of its own, got a {type(network).__name__} that has the student's:"
            " freezing it would freeze both; give copy.deepcopy(network), a checkpoint's path, or MovingAverage()"
        )
    return network.requires_grad_(False).eval()


def _as_floats(value: Tensor, *, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
