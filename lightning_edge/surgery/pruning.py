"""Set the weights of least importance to zero."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_edge.functional.pruning import pruned_count, smallest_masks
from lightning_edge.surgery.selection import select_weights

Scope = Literal["global", "layer"]
Score = Callable[[Tensor], Tensor]
SCOPES = ("global", "layer")


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


def magnitude(weight: Tensor) -> Tensor:
    """Return |weight|: small weights matter least (Han et al. 2015, arXiv:1506.02626).

    >>> magnitude(torch.tensor([-2.0, 1.0]))
    tensor([2., 1.])
    """
    return weight.abs()


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a fraction of zeros.

    Raises:
        ValueError: If it is not in [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    if isinstance(sparsity, bool) or not 0.0 <= sparsity < 1.0:
        mend = f"; for {sparsity:g} percent write {sparsity / 100:g}" if 1 <= sparsity < 100 else ""
        raise ValueError(f"sparsity must lie in [0, 1), the fraction of zeros, got {sparsity!r}{mend}")
    return float(sparsity)


def check_scope(scope: str) -> Scope:
    """Return ``scope`` if it is known.

    Raises:
        ValueError: If it is not.

    >>> check_scope("layer")
    'layer'
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {list(SCOPES)}, got {scope!r}")
    return "global" if scope == "global" else "layer"


@torch.no_grad()
def prune_(
    module: nn.Module,
    *,
    sparsity: float,
    scope: Scope = "global",
    pattern: Literal["unstructured"] = "unstructured",
    score: Literal["magnitude"] | Score = "magnitude",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> PruneReport:
    """Set the weights of least score to exactly 0.0, as many as ``sparsity`` says.

    Args:
        module: The network; its selected weights are changed in place.
        sparsity: Final fraction of zeros among the selected weights, in [0, 1).
        scope: ``"global"`` compares all weights with each other, ``"layer"`` prunes each layer to ``sparsity``.
        pattern: ``"unstructured"``: any weight may go.
        score: ``"magnitude"``, or a function from a weight to its importance, same shape.
        include: Layers to prune, globs over names or class names; the default is every linear and convolution layer.
        exclude: Layers to leave alone.

    Returns:
        The zeros of each layer and the masks.

    Raises:
        ValueError: If an argument is out of its range or a pattern matches no layer.

    >>> prune_(nn.Linear(8, 4), sparsity=0.75).zeros
    24
    """
    check_sparsity(sparsity)
    check_scope(scope)
    if pattern != "unstructured":
        raise ValueError(f"pattern must be 'unstructured', got {pattern!r}")
    if score != "magnitude" and not callable(score):
        raise ValueError(f"score must be 'magnitude' or a callable, got {score!r}")
    importance = magnitude if score == "magnitude" else score
    weights = select_weights(module, include=include, exclude=exclude)
    scores = [importance(weight.detach()) for weight in weights.values()]
    if scope == "global":
        count = pruned_count(sum(s.numel() for s in scores), sparsity)
        masks = smallest_masks(scores, count=count)
    else:
        masks = [smallest_masks([s], count=pruned_count(s.numel(), sparsity))[0] for s in scores]
    report = dict(zip(weights, masks, strict=True))
    apply_masks_(weights, report)
    layers = tuple(LayerSparsity(name, mask.numel(), mask.numel() - int(mask.sum())) for name, mask in report.items())
    return PruneReport(layers, report)


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
