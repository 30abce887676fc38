"""Set the weights of least importance to zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.functional import scores as score_functions
from lightning_edge.surgery.pruning_target import Scope, Sparsity, Target
from lightning_edge.surgery.synflow import synflow_scores

Score = Callable[[Tensor], Tensor]
SCORES = ("magnitude", "lamp", "taylor", "movement", "snip", "synflow", "random")
_SYNFLOW_ROUNDS = 100


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
        score: ``"magnitude"``; ``"lamp"``, magnitudes that layers can compare (Lee et al. 2021, arXiv:2010.07611);
            ``"taylor"``, |w g| (Molchanov et al. 2019, arXiv:1906.10771); ``"movement"``, -w g (Sanh et al. 2020,
            arXiv:2005.07683); ``"snip"``, |w g| at initialization (Lee et al. 2019, arXiv:1810.02340): these three read
            ``weight.grad``, so call ``backward`` first; ``"synflow"`` (Tanaka et al. 2020, arXiv:2006.05467), without
            data; ``"random"``; or a function from a weight to the importance of its elements, same shape.
        include: Layers to prune, globs over names or class names; the default is every linear and convolution layer,
            and the projections of attention.
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
        masks = score_masks(module, target, weights, score, generator=generator)
    apply_masks_(weights, masks)
    layers = tuple(
        LayerSparsity(name, mask.numel(), mask.numel() - int(mask.count_nonzero())) for name, mask in masks.items()
    )
    return PruneReport(layers, masks)


def score_masks(
    module: nn.Module,
    target: Target,
    weights: Mapping[str, Tensor],
    score: str | Score,
    *,
    progress: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the masks of a score that looks at weights and gradients as they are now.

    Raises:
        ValueError: If a gradient is missing, or a callable returns another shape.
    """
    if score == "magnitude":
        return target.masks(module, weights, progress=progress, absolute=True)
    return target.masks(module, weight_scores(weights, score, generator=generator), progress=progress)


def weight_scores(
    weights: Mapping[str, Tensor], score: str | Score, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return the importance of every weight, by any score but magnitude: there the weights say it themselves.

    Raises:
        ValueError: If a gradient is missing, or a callable returns another shape.
    """
    if score == "random" and generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    if score == "lamp":
        score = score_functions.lamp
    scores = {}
    for name, weight in weights.items():
        if callable(score):
            found = score(weight.detach())
            if found.shape != weight.shape:
                raise ValueError(
                    f"score must return the shape {tuple(weight.shape)} of {name!r}, got {tuple(found.shape)}"
                )
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
    final = sum(target.counts(module, weights).values())
    dense = sum(weight.numel() for weight in weights.values())
    masks = {name: torch.ones(weight.shape, dtype=torch.bool, device=weight.device) for name, weight in weights.items()}
    for number in range(1, _SYNFLOW_ROUNDS + 1):
        # The density falls exponentially (the paper's algorithm 1): the same share of what is left in every round.
        gone = dense * (1 - (1 - final / dense) ** (number / _SYNFLOW_ROUNDS))
        progress = 1.0 if number == _SYNFLOW_ROUNDS else min(1.0, gone / max(final, 1))
        masks = target.masks(module, synflow_scores(module, weights, masks, inputs), progress=progress)
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
        weight = weights[name]
        torch.where(mask, weight, weight.new_zeros(()), out=weight)
