"""Set the weights of least importance to zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_edge.functional import scores as score_functions
from lightning_edge.functional.budgets import erdos_renyi_kernel, global_masks, kept_floor
from lightning_edge.functional.patterns import NofM, Pattern, Unstructured, find_pattern, pattern_masks, prunable
from lightning_edge.functional.pruning import pruned_count
from lightning_edge.surgery.selection import select_weights
from lightning_edge.surgery.synflow import synflow_scores

Scope = Literal["global", "layer", "erk"]
Score = Callable[[Tensor], Tensor]
Sparsity = float | Mapping[str, float]
SCOPES = ("global", "layer", "erk")
SCORES = ("magnitude", "taylor", "movement", "snip", "synflow", "random")
_SYNFLOW_ROUNDS = 100
_PATTERN_TOLERANCE = 0.005  # 1:3 may be written as 0.67


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one weight tensor."""

    name: str
    size: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Zeros / size, in [0, 1]."""
        return self.zeros / self.size


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune_` did: the zeros of each layer, and the masks (True = kept) that keep them."""

    layers: tuple[LayerSparsity, ...]
    masks: Mapping[str, Tensor] = field(repr=False)

    @property
    def zeros(self) -> int:
        """Number of zeros among the selected weights."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Zeros / all selected weights, in [0, 1]."""
        return self.zeros / sum(layer.size for layer in self.layers)


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

    >>> Target(0.5, pattern="2:4").counts({"fc.weight": (3, 8)})
    {('fc.weight',): 12}
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
        if self.scope == "erk" and isinstance(self.sparsity, Mapping):
            raise ValueError("scope must not be 'erk' with a mapping for sparsity: both say what each layer loses")

    @property
    def shape(self) -> Pattern:
        """The pattern, parsed."""
        return find_pattern(self.pattern)

    def check(self, network: nn.Module, *, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Raise a ValueError unless the patterns of ``sparsity`` match, and every layer can keep its floor."""
        self.counts({name: tuple(weight.shape) for name, weight in self.select(network, include, exclude).items()})

    def select(self, network: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
        """Return the weights that are to be pruned, by name.

        Raises:
            ValueError: As :func:`~lightning_edge.surgery.selection.select_weights`; or if a name of ``sparsity``
            matches
                no layer of them.
        """
        weights = select_weights(network, include=include, exclude=exclude)
        if isinstance(self.sparsity, Mapping):
            layers = [_layer(name) for name in weights]
            for pattern in self.sparsity:
                if not any(fnmatchcase(layer, pattern) for layer in layers):
                    raise ValueError(f"sparsity must name selected layers, got {pattern!r}; they are {layers[:6]}")
            weights = {name: weight for name, weight in weights.items() if self._own(name) is not None}
        return weights

    def counts(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, ...], int]:
        """Return how many weights go in the end: of each set of weights that are compared with each other.

        Raises:
            ValueError: If the floors of ``min_kept`` leave too few.
        """
        sizes = {name: prunable(shape, self.shape) for name, shape in shapes.items()}
        totals = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
        names = tuple(shapes)
        counts: dict[tuple[str, ...], int] = {}
        if isinstance(self.shape, NofM):
            if self.scope == "global":
                return {names: sum(sizes.values())}
            counts = {(name,): sizes[name] for name in names}
            return counts
        if isinstance(self.sparsity, Mapping):
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
        return counts

    def masks(self, scores: Mapping[str, Tensor], *, progress: float = 1.0) -> dict[str, Tensor]:
        """Return the masks, True = kept, when ``progress`` of the way to the target is done.

        Args:
            scores: Importance of every weight, of the weight's shape.
            progress: In [0, 1]; at 1 the count is exactly the target's, before it is never above.

        Raises:
            ValueError: If a score is not finite, or a layer cannot keep its floor.
        """
        masks: dict[str, Tensor] = {}
        counts = self.counts({name: tuple(score.shape) for name, score in scores.items()})
        for names, final in counts.items():
            count = pruned_count(final, progress)
            chosen = [scores[name] for name in names]
            floors = [kept_floor(score.numel(), self.min_kept) for score in chosen]
            if isinstance(self.shape, Unstructured):
                found = global_masks(chosen, count=count, min_kept=floors)
            else:
                found = pattern_masks(chosen, count=count, pattern=self.shape)
                for name, mask, floor in zip(names, found, floors, strict=True):
                    if int(mask.sum()) < floor:
                        raise ValueError(
                            f"min_kept must be within reach of blocks, got {self.min_kept!r}: layer {_layer(name)!r}"
                            f" would keep {int(mask.sum())}; take scope='layer', or exclude it"
                        )
            masks |= zip(names, found, strict=True)
        return {name: masks[name] for name in scores}

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


def check_score(score: str | Score) -> str | Score:
    """Return ``score`` if it is known.

    Raises:
        ValueError: If it is not.

    >>> check_score("taylor")
    'taylor'
    """
    if not callable(score) and score not in SCORES:
        raise ValueError(f"score must be one of {list(SCORES)} or a callable, got {score!r}")
    return score


@torch.no_grad()
def prune_(
    module: nn.Module,
    *,
    sparsity: Sparsity,
    scope: Scope = "global",
    pattern: str = "unstructured",
    score: str | Score = "magnitude",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    min_kept: int | float = 1,
    generator: torch.Generator | None = None,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
) -> PruneReport:
    """Set the weights of least score to exactly 0.0, as many as ``sparsity`` says.

    Args:
        module: The network; its selected weights are changed in place.
        sparsity: Final fraction of zeros among the selected weights, in [0, 1). A mapping ``{"fc*": 0.95, "conv1":
            0.3}`` gives each layer that of the first pattern that matches its name; other layers stay dense.
        scope: ``"global"`` compares all weights with each other, ``"layer"`` prunes each layer to ``sparsity``,
            ``"erk"`` gives each layer its Erdos-Renyi-kernel budget (Evci et al. 2020, arXiv:1911.11134): small layers
            stay denser.
        pattern: ``"unstructured"``: any weight may go. ``"2:4"``, any N:M: of every M weights along the input dimension
            at most N stay. ``"1x4"``, any RxC: blocks of R outputs by C inputs go together.
        score: ``"magnitude"``; ``"taylor"``, |w g| (Molchanov et al. 2019, arXiv:1906.10771); ``"movement"``, -w g
            (Sanh et al. 2020, arXiv:2005.07683); ``"snip"``, |w g| at initialization (Lee et al. 2019,
            arXiv:1810.02340): these three read ``weight.grad``, so call ``backward`` first; ``"synflow"`` (Tanaka et
            al. 2020, arXiv:2006.05467), without data; ``"random"``; or a function from a weight to the importance of
            its elements, same shape.
        include: Layers to prune, globs over names or class names; the default is every linear and convolution layer.
        exclude: Layers to leave alone.
        min_kept: Weights that every layer keeps at least, a number or a fraction in [0, 1), so that no layer dies.
        generator: Of the CPU, for ``"random"``; by default one that is seeded from torch's global generator.
        example_inputs: For ``"synflow"``: what the network is called with.

    Returns:
        The zeros of each layer and the masks.

    Raises:
        ValueError: If an argument is out of its range, a pattern matches no layer, or a score lacks what it needs.

    >>> prune_(nn.Linear(8, 4), sparsity=0.75).zeros
    24
    """
    target = Target(sparsity, scope=scope, pattern=pattern, min_kept=min_kept)
    check_score(score)
    weights = target.select(module, include, exclude)
    if score == "synflow":
        masks = synflow_masks(module, target, weights, example_inputs)
    else:
        masks = target.masks(weight_scores(weights, score, generator=generator))
    apply_masks_(weights, masks)
    layers = tuple(LayerSparsity(name, mask.numel(), mask.numel() - int(mask.sum())) for name, mask in masks.items())
    return PruneReport(layers, masks)


def weight_scores(
    weights: Mapping[str, Tensor], score: str | Score, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return the importance of every weight, from the weights and their gradients as they are now.

    Raises:
        ValueError: If a gradient is missing, or a callable returns another shape.
    """
    if score == "random" and generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    scores = {}
    for name, weight in weights.items():
        if callable(score):
            found = score(weight.detach())
            if found.shape != weight.shape:
                raise ValueError(
                    f"score must return the shape {tuple(weight.shape)} of {name!r}, got {tuple(found.shape)}"
                )
        elif score == "magnitude":
            found = score_functions.magnitude(weight)
        elif score == "random":
            assert generator is not None
            found = score_functions.random(weight, generator)
        elif weight.grad is None:
            raise ValueError(f"score {score!r} must find gradients, got none of {name!r}: call backward first")
        else:
            found = (score_functions.movement if score == "movement" else score_functions.taylor)(weight, weight.grad)
        scores[name] = found
    return scores


def synflow_masks(
    module: nn.Module, target: Target, weights: Mapping[str, Tensor], example_inputs: tuple[Any, ...] | Tensor | None
) -> dict[str, Tensor]:
    """Return the masks of synaptic flow: in rounds, each of which scores what the last one left.

    Raises:
        ValueError: If there are no ``example_inputs``.
    """
    if example_inputs is None:
        raise ValueError("example_inputs must be given for score 'synflow', got None: what the network is called with")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    final = sum(target.counts({name: tuple(weight.shape) for name, weight in weights.items()}).values())
    dense = sum(weight.numel() for weight in weights.values())
    masks = {name: torch.ones(weight.shape, dtype=torch.bool, device=weight.device) for name, weight in weights.items()}
    for number in range(1, _SYNFLOW_ROUNDS + 1):
        # The density falls exponentially (the paper's algorithm 1): the same share of what is left in every round.
        gone = dense * (1 - (1 - final / dense) ** (number / _SYNFLOW_ROUNDS))
        progress = 1.0 if number == _SYNFLOW_ROUNDS else min(1.0, gone / max(final, 1))
        masks = target.masks(synflow_scores(module, weights, masks, inputs), progress=progress)
    return masks


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every weight whose mask is False to exactly 0.0.

    >>> weight = torch.tensor([1.0, 2.0])
    >>> apply_masks_({"w": weight}, {"w": torch.tensor([True, False])}); weight
    tensor([1., 0.])
    """
    for name, mask in masks.items():
        # Not a product: a negative weight times zero is -0.0, a second zero for every coder, and NaN would stay NaN.
        weights[name].masked_fill_(mask.logical_not(), 0.0)


def _layer(name: str) -> str:
    """Return the layer's name of a weight's."""
    return name.rpartition(".")[0]
