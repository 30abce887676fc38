"""Networks that teach: frozen, in evaluation mode, outside of every module."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
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
        if cache is not None:
            _check_folder(Path(cache).expanduser())
        self.shares = [share / sum(shares) for share in shares]
        self.networks: list[nn.Module] = []
        self.precision = precision
        self._folder = None if cache is None else Path(cache).expanduser()
        self._caches: dict[tuple[int, str], TeacherCache] = {}
        self._sources = list(sources)
        self._early: Mapping[str, Tensor] = {}
        self._restored = False

    def __deepcopy__(self, memo: dict[int, object]) -> "Teachers":
        """Return the same frozen networks; a fit of the copy begins averages of its own."""
        own = copy.copy(self)
        own.networks, own._caches = list(self.networks), dict(self._caches)
        return own

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

    def stand_ins(self, student: nn.Module) -> list[nn.Module | None]:
        """Return a network with the layers of each teacher, read from no file; None of one that is yet to be built."""
        return [_stand_in(source, student) for source in self._sources]

    @torch.no_grad()
    def __call__(self, index: int, call: Call, layers: Sequence[str], *, device: torch.device) -> Call:
        """Return what one teacher gives for the inputs of the student's call, floating-point numbers as float32.

        It is in evaluation mode whatever else was called, and on the student's device.
        """
        network = self.networks[index]
        parameter = next(islice(network.parameters(), 1), None)
        if parameter is not None and parameter.device != device:
            network.to(device)
        if any(module.training for module in network.modules()):
            network.eval()
        # A student of other numbers (precision="bf16-true") is given inputs of its own kind.
        wanted = torch.float32 if parameter is None else parameter.dtype
        # Copies: a network may change what it is given.
        args, kwargs = tree_map_only(Tensor, partial(_as_floats, dtype=wanted, copy=True), (call.args, call.kwargs))
        compute = partial(self._compute, network, layers, device)
        if self._folder is None:
            return compute(args, kwargs)
        return self._cache(index, layers, device).answer(args, kwargs, compute)

    def begin(self, student: nn.Module) -> None:
        """Begin the averages of a fit with the student as it is now, unless its checkpoint brought them."""
        if not self._restored:
            for index, source in enumerate(self._sources):
                if isinstance(source, MovingAverage):
                    self.networks[index] = _build(source, student)
        self._restored = False

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
            current = student.state_dict()
            # A tensor with two names moves once.
            average = {value.data_ptr(): (name, value) for name, value in self.networks[index].state_dict().items()}
            for name, value in average.values():
                if value.is_floating_point():
                    value.lerp_(current[name].to(value), 1 - source.decay)
                else:
                    value.copy_(current[name])

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
        self._early, self._restored = {} if self.networks else state, True
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
        layers: Sequence[str],
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
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

    def _cache(self, index: int, layers: Sequence[str], device: torch.device) -> TeacherCache:
        with self._casting(device):
            casting = torch.is_autocast_enabled(device.type)
            precision = str(torch.get_autocast_dtype(device.type)) if casting else "as it is"
        if (index, precision) not in self._caches:
            assert self._folder is not None
            key = teacher_key(self.networks[index], layers, precision=precision)
            self._caches[index, precision] = TeacherCache(self._folder / key)
        return self._caches[index, precision]

    def _reshaped(self, index: int, student: nn.Module) -> bool:
        """Copy the student anew if its shapes are not the average's any more; return whether they were not."""
        average = self.networks[index].state_dict()
        differs = any(average[name].shape != value.shape for name, value in student.state_dict().items())
        if differs:
            self.networks[index] = _build(self._sources[index], student)
        return differs


def _check_folder(cache: Path) -> None:
    there = next((path for path in (cache, *cache.absolute().parents) if path.exists()), cache)
    if not there.is_dir():
        raise ValueError(f"cache must be a folder, got {str(cache)!r}, where {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cache must be a folder that can be written, got {str(cache)!r}, where {str(there)!r} cannot")


def _stand_in(source: TeacherSource, student: nn.Module) -> nn.Module | None:
    if isinstance(source, str | Path | MovingAverage):
        return student
    if isinstance(source, L.LightningModule):
        return None if is_overridden("configure_model", source) else find_network(source)
    return source if isinstance(source, nn.Module) else None


def _build(source: TeacherSource, student: nn.Module) -> nn.Module:
    """Return the frozen network that a source stands for."""
    if isinstance(source, str | Path | MovingAverage):
        network = copied(student)
        vars(network).pop("forward", None)  # of a student under quantization-aware training, the plain one
        if not isinstance(source, MovingAverage):
            load_weights_(network, source)
        return network.requires_grad_(False).eval()
    built = source if isinstance(source, nn.Module) or not callable(source) else source()
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"teacher must be a network, a callable that builds one, or a path, got {type(built).__name__}"
        )
    if isinstance(built, L.LightningModule):
        built.configure_model()
    network = find_network(built) if isinstance(built, L.LightningModule) else built
    if {id(parameter) for parameter in network.parameters()} & {id(parameter) for parameter in student.parameters()}:
        raise ValueError(
            f"teacher must have parameters of its own, got a {type(network).__name__} that has the student's:"
            " freezing it would freeze both; give copy.deepcopy(network), a checkpoint's path, or MovingAverage()"
        )
    return network.requires_grad_(False).eval()


def _as_floats(value: Tensor, *, dtype: torch.dtype, copy: bool = False) -> Tensor:
    return value.to(dtype if value.is_floating_point() else value.dtype, copy=copy)
