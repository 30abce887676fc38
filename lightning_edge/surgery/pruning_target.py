"""How many weights of which layers are to be zero, and in which pattern."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_edge.functional.budgets import erdos_renyi_kernel, global_masks, kept_floor
from lightning_edge.functional.patterns import NofM, Pattern, Unstructured, find_pattern, pattern_masks, prunable
from lightning_edge.functional.pruning import pruned_count
from lightning_edge.functional.scores import magnitude
from lightning_edge.surgery.layout import outputs_first
from lightning_edge.surgery.selection import select_weights

Scope = Literal["global", "layer", "erk"]
Sparsity = float | Mapping[str, float]
SCOPES = ("global", "layer", "erk")
_PATTERN_TOLERANCE = 0.005  # 1:3 may be written as 0.67
_NOTABLE_SHORTFALL = 0.01


@dataclass(frozen=True)
class Target:
    """How many weights of which layers are to be zero, and in which pattern.

    Attributes:
        sparsity: Final fraction of zeros, in [0, 1); or a mapping from a layer's name or glob to that of its layers,
            where the first pattern that matches counts and a layer that none matches is left dense.
        scope: "global", "layer" or "erk"; see :func:`prune_`.
        pattern: "unstructured", N:M or blocks; see :func:`prune_`.
        min_kept: Weights that every layer keeps at least, a number or a fraction.

    Raises:
        ValueError: If an argument is out of its range, or they do not go together.

    >>> layer = nn.Linear(8, 3)
    >>> Target(0.5, pattern="2:4").counts(layer, {"weight": layer.weight})
    {('weight',): 12}
    """

    sparsity: Sparsity
    scope: str = "global"
    pattern: str = "unstructured"
    min_kept: int | float = 1

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Mapping):
            if not self.sparsity:
                raise ValueError("sparsity must name a layer, got an empty mapping")
            for value in self.sparsity.values():
                check_sparsity(value)
        else:
            check_sparsity(self.sparsity)
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {list(SCOPES)}, got {self.scope!r}")
        kept_floor(1, self.min_kept)
        shape = self.shape
        if isinstance(shape, NofM):
            exact = 1 - shape.kept / shape.group
            if isinstance(self.sparsity, Mapping) or abs(self.sparsity - exact) > _PATTERN_TOLERANCE:
                raise ValueError(
                    f"sparsity must be {exact:g} for pattern {self.pattern!r}, which fixes it, got {self.sparsity}"
                )
            if self.scope == "erk":
                raise ValueError(
                    f"scope must not be 'erk' for pattern {self.pattern!r}, which fixes every layer's sparsity"
                )
            if isinstance(self.min_kept, float) and self.min_kept > 1 - exact:
                raise ValueError(
                    f"min_kept must be at most {1 - exact:g} for pattern {self.pattern!r}, which keeps that fraction of"
                    f" every layer, got {self.min_kept}"
                )
        if self.scope == "erk" and isinstance(self.sparsity, Mapping):
            raise ValueError("scope must not be 'erk' with a mapping for sparsity: both say what each layer loses")

    @property
    def shape(self) -> Pattern:
        """The pattern, parsed."""
        return find_pattern(self.pattern)

    def select(
        self, network: nn.Module, include: Sequence[str], exclude: Sequence[str], *, trainable: bool = True
    ) -> dict[str, nn.Parameter]:
        """Return the weights that are to be pruned, by name.

        Args:
            network: The network; names are relative to it.
            include: Globs; see :func:`~lightning_edge.surgery.selection.select_weights`.
            exclude: Globs.
            trainable: Refuse frozen layers.

        Raises:
            ValueError: As ``select_weights``; or if a name of ``sparsity`` matches no layer of them.
        """
        weights = select_weights(network, include=include, exclude=exclude, trainable=trainable, attention=True)
        if isinstance(self.sparsity, Mapping):
            layers = [_layer(name) for name in weights]
            for pattern in self.sparsity:
                if not any(fnmatchcase(layer, pattern) for layer in layers):
                    raise ValueError(f"sparsity must name selected layers, got {pattern!r}; they are {layers[:6]}")
            weights = {name: weight for name, weight in weights.items() if self._own(name) is not None}
        return weights

    def counts(self, network: nn.Module, weights: Mapping[str, Tensor]) -> dict[tuple[str, ...], int]:
        """Return how many weights go in the end: of each set of weights that are compared with each other.

        Args:
            network: Says of which layers the weights are.
            weights: By name; their shapes alone matter.

        Raises:
            ValueError: If the floors of ``min_kept`` leave too few.
        """
        shapes = {name: tuple(weight.shape) for name, weight in self._turned(network, weights).items()}
        sizes = {name: prunable(shape, self.shape) for name, shape in shapes.items()}
        totals = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
        names = tuple(shapes)
        counts: dict[tuple[str, ...], int] = {}
        if isinstance(self.shape, NofM):
            # Every layer loses all that the pattern takes, in the end: whether they are compared or not.
            counts = {(name,): sizes[name] for name in names}
        elif isinstance(self.sparsity, Mapping):
            counts = {(name,): pruned_count(totals[name], self._own(name) or 0.0) for name in names}
        elif self.scope == "global":
            counts = {names: pruned_count(sum(totals.values()), self.sparsity)}
        elif self.scope == "erk":
            each = erdos_renyi_kernel(list(shapes.values()), sparsity=self.sparsity)
            counts = {(name,): count for name, count in zip(names, each, strict=True)}
        else:
            counts = {(name,): pruned_count(totals[name], self.sparsity) for name in names}
        for group, count in counts.items():
            most = sum(totals[name] - kept_floor(totals[name], self.min_kept) for name in group)
            if count > most:
                raise ValueError(
                    f"min_kept must leave {count} weights of {_layer(group[0])!r} and {len(group) - 1} more layers to"
                    f" prune, got {self.min_kept!r}, which leaves {most}: lower it, or the sparsity"
                )
        if isinstance(self.shape, NofM) and self.scope == "global":
            return {names: sum(sizes.values())}
        return counts

    def masks(
        self, network: nn.Module, scores: Mapping[str, Tensor], *, progress: float = 1.0, absolute: bool = False
    ) -> dict[str, Tensor]:
        """Return the masks, True = kept, when ``progress`` of the way to the target is done.

        With blocks that do not fit the count, fewer weights go; a warning says so where it matters.

        Args:
            network: Says of which layers the scores are.
            scores: Importance of every weight, of the weight's shape.
            progress: In [0, 1]; at 1 the count is exactly the target's, before it is never above.
            absolute: Compare absolute values: of the weights themselves, without a copy of them.

        Raises:
            ValueError: If a score is not finite, a layer cannot keep its floor, or a pattern fits no layer.
        """
        masks: dict[str, Tensor] = {}
        counts = self.counts(network, scores)
        turned = self._turned(network, scores)
        for names, final in counts.items():
            count = pruned_count(final, progress)
            chosen = [turned[name] for name in names]
            floors = [kept_floor(score.numel(), self.min_kept) for score in chosen]
            if isinstance(self.shape, Unstructured):
                found = global_masks(chosen, count=count, min_kept=floors, absolute=absolute)
            else:
                chosen = [magnitude(score) for score in chosen] if absolute else chosen
                found = pattern_masks(chosen, count=count, pattern=self.shape)
                for name, mask, floor in zip(names, found, floors, strict=True):
                    if int(mask.count_nonzero()) < floor:
                        raise ValueError(
                            f"min_kept must be within reach of blocks, got {self.min_kept!r}: layer {_layer(name)!r}"
                            f" would keep {int(mask.count_nonzero())}; take scope='layer', or exclude it"
                        )
                if progress == 1.0:
                    self._warn_of_shortfall(names, found, count)
            masks |= zip(names, found, strict=True)
        if progress == 1.0 and not isinstance(self.shape, Unstructured) and all(bool(m.all()) for m in masks.values()):
            raise ValueError(
                f"pattern must find weights to prune, got {self.pattern!r} for {[_layer(name) for name in masks][:4]},"
                " whose inputs are too few: choose other layers, or another pattern"
            )
        return self._turned(network, {name: masks[name] for name in scores})

    def _turned(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as patterns see them, outputs first; or, of such tensors, as the weights are."""
        if isinstance(self.shape, Unstructured):
            return dict(tensors)
        return {name: outputs_first(tensor, network.get_submodule(_layer(name))) for name, tensor in tensors.items()}

    def _warn_of_shortfall(self, names: Sequence[str], masks: Sequence[Tensor], count: int) -> None:
        size = sum(mask.numel() for mask in masks)
        zeros = size - sum(int(mask.count_nonzero()) for mask in masks)
        if (count - zeros) / size > _NOTABLE_SHORTFALL:
            warnings.warn(
                f"whole blocks of {self.pattern} do not reach sparsity {count / size:.4g}: {_layer(names[0])!r} and"
                f" {len(names) - 1} more layers end at {zeros / size:.4g}; take smaller blocks, scope='global', or a"
                " sparsity that blocks divide",
                stacklevel=2,
            )

    def _own(self, name: str) -> float | None:
        """Return the sparsity that a mapping gives a weight, or None."""
        assert isinstance(self.sparsity, Mapping)
        return next((value for pattern, value in self.sparsity.items() if fnmatchcase(_layer(name), pattern)), None)


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a fraction of zeros.

    Raises:
        ValueError: If it is not in [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    if isinstance(sparsity, bool | str) or not 0.0 <= sparsity < 1.0:
        percent = not isinstance(sparsity, bool | str) and 1 <= sparsity < 100
        mend = f"; for {sparsity:g} percent write {sparsity / 100:g}" if percent else ""
        raise ValueError(f"sparsity must lie in [0, 1), the fraction of zeros, got {sparsity!r}{mend}")
    return float(sparsity)


def _layer(name: str) -> str:
    """Return the layer's name of a weight's."""
    return name.rpartition(".")[0]
