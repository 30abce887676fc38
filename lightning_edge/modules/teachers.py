"""Networks that teach: frozen, in evaluation mode, outside of every module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_edge.surgery.copying import copied
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
OutputAdapter = Callable[[Any], Tensor]


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

    Raises:
        ValueError: If there are no sources, or the weights do not fit.
    """

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float] | None = None) -> None:
        if not sources:
            raise ValueError("teacher must be at least one network, got an empty list")
        shares = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(sources) or min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(f"teacher_weights must be {len(sources)} numbers >= 0, not all zero, got {weights}")
        self.shares = [share / sum(shares) for share in shares]
        self.networks: list[nn.Module] = []
        self._sources = list(sources)

    def __deepcopy__(self, memo: dict[int, object]) -> "Teachers":
        return self

    def build(self, student: nn.Module) -> None:
        """Build and load what is only named so far.

        Args:
            student: The student's network, whose architecture a checkpoint's path stands for.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If a source gives no network.
        """
        if not self.networks:
            self.networks = [self._build(source, student).requires_grad_(False).eval() for source in self._sources]

    @torch.no_grad()
    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], *, device: torch.device) -> Any:
        """Return the output of one teacher, in evaluation mode whatever else was called, on the student's device."""
        network = self.networks[index]
        if any(parameter.device != device for parameter in islice(network.parameters(), 1)):
            network.to(device)
        if network.training:
            network.eval()
        return network(*args, **kwargs)

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
        """Take over what :meth:`averages` returned, of a student of these widths."""
        for index, source in enumerate(self._sources):
            if isinstance(source, MovingAverage):
                self._reshaped(index, student)
                own = {n.removeprefix(f"{index}."): v for n, v in state.items() if n.startswith(f"{index}.")}
                self.networks[index].load_state_dict(own)

    def _reshaped(self, index: int, student: nn.Module) -> bool:
        """Copy the student anew if its shapes are not the average's any more; return whether they were not."""
        average = self.networks[index].state_dict()
        differs = any(average[name].shape != value.shape for name, value in student.state_dict().items())
        if differs:
            self.networks[index] = self._build(self._sources[index], student).requires_grad_(False).eval()
        return differs

    @staticmethod
    def _build(source: TeacherSource, student: nn.Module) -> nn.Module:
        if isinstance(source, str | Path | MovingAverage):
            network = copied(student)
            vars(network).pop("forward", None)  # of a student under quantization-aware training, the plain one
            if not isinstance(source, MovingAverage):
                load_weights_(network, source)
            return network
        built = source if isinstance(source, nn.Module) else source()
        if not isinstance(built, nn.Module):
            raise ValueError(
                f"teacher must be a network, a callable that builds one, or a path, got {type(built).__name__}"
            )
        return find_network(built) if isinstance(built, L.LightningModule) else built
