"""Give the weights of a layer a small number of shared values, and keep them shared while they are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_edge.functional.sharing import Init, check_clusters, check_init, cluster_means, kmeans_1d
from lightning_edge.surgery.selection import select_weights

Gradient = Literal["mean", "sum"]
Clusters = int | Mapping[str, int]


@dataclass(frozen=True)
class LayerSharing:
    """Shared values of one weight tensor."""

    name: str
    size: int
    zeros: int
    clusters: int
    inertia: float


@dataclass(frozen=True)
class ShareReport:
    """What :func:`share_weights_` did.

    ``codes`` has, per weight tensor and in its shape, 0 where the weight is zero and 1 to k for its shared value.
    """

    layers: tuple[LayerSharing, ...]
    codes: Mapping[str, Tensor] = field(repr=False)

    @property
    def inertia(self) -> float:
        """Sum of the squared changes of all weights."""
        return sum(layer.inertia for layer in self.layers)


def resolve_clusters(clusters: Clusters | None, bits: int | None) -> Clusters:
    """Return the clusters per layer from either of the two ways to say them.

    Raises:
        ValueError: If both or neither are given, or one is out of its range.

    >>> resolve_clusters(None, 4)
    16
    """
    if clusters is None and bits is not None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise ValueError(f"bits must be a whole number from 1 to 16, got {bits!r}")
        return 1 << bits
    if clusters is None or bits is not None:
        raise ValueError(f"clusters or bits must be given, one of them, got clusters={clusters!r} and bits={bits!r}")
    if isinstance(clusters, Mapping):
        if not clusters:
            raise ValueError("clusters must name at least one pattern, got an empty mapping")
        for value in clusters.values():
            check_clusters(value)
        return dict(clusters)
    check_clusters(clusters)
    return clusters


def select_shared(
    module: nn.Module, clusters: Clusters, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, tuple[nn.Parameter, int]]:
    """Return the weights to share with the number of shared values of each, by name.

    With a mapping, a layer takes the number of the first pattern that matches its name, and is left out if none does.

    Raises:
        ValueError: If a pattern of ``include``, ``exclude`` or ``clusters`` matches no layer.

    >>> [k for _, k in select_shared(nn.Sequential(nn.Linear(2, 2)), {"0": 4}).values()]
    [4]
    """
    weights = select_weights(module, include=include, exclude=exclude)
    if isinstance(clusters, int):
        return {name: (weight, clusters) for name, weight in weights.items()}
    chosen: dict[str, tuple[nn.Parameter, int]] = {}
    for pattern, count in clusters.items():
        # Validates the pattern and matches class names too, exactly as include does.
        matching = select_weights(module, include=[pattern])
        chosen |= {name: (weights[name], count) for name in matching if name in weights and name not in chosen}
    return {name: chosen[name] for name in weights if name in chosen}


@torch.no_grad()
def share_weights_(
    module: nn.Module,
    *,
    clusters: Clusters | None = None,
    bits: int | None = None,
    init: Init = "linear",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> ShareReport:
    """Replace the weights of every selected layer by the centroids of a k-means over them (Han et al. 2016, sec. 3).

    Weights that are exactly zero stay zero and are no part of the clustering: a layer of a pruned network ends with at
    most k + 1 distinct values.

    Args:
        module: The network; its selected weights are changed in place.
        clusters: Shared non-zero values of a layer, or a mapping from patterns to them (``{"conv*": 256, "fc*": 32}``).
        bits: The same said in bits: ``clusters = 2**bits``.
        init: Start of the k-means, see :func:`~lightning_edge.functional.sharing.kmeans_1d`.
        include: Layers to share, globs over names or class names.
        exclude: Layers to leave alone.
        generator: Source of the draws of ``init="random"`` and ``"kmeans++"``.

    Returns:
        Per layer the number of shared values and the squared error; and the codes.

    Raises:
        ValueError: If an argument is out of its range or a pattern matches no layer.

    >>> layer = nn.Linear(8, 4)
    >>> share_weights_(layer, clusters=3).layers[0].clusters, len(layer.weight.unique())
    (3, 3)
    """
    check_init(init)
    selected = select_shared(module, resolve_clusters(clusters, bits), include=include, exclude=exclude)
    layers, all_codes = [], {}
    for name, (weight, count) in selected.items():
        live = weight != 0
        codes = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
        inertia, used = 0.0, 0
        if bool(live.any()):
            values = weight[live]
            centroids, value_codes = kmeans_1d(values, count, init=init, generator=generator)
            shared = centroids[value_codes]
            inertia, used = float((values - shared).double().square().sum()), len(centroids)
            weight[live] = shared
            codes[live] = value_codes + 1
        layers.append(LayerSharing(name, weight.numel(), weight.numel() - int(live.sum()), used, inertia))
        all_codes[name] = codes
    return ShareReport(tuple(layers), all_codes)


@torch.no_grad()
def project_shared_(weights: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
    """Set every weight to the mean of its cluster, and those of code 0 to zero.

    >>> weight = torch.tensor([1.0, 3.0, 0.5])
    >>> project_shared_({"w": weight}, {"w": torch.tensor([1, 1, 0])}); weight
    tensor([2., 2., 0.])
    """
    for name, code in codes.items():
        weights[name].copy_(_per_cluster(weights[name], code, "mean"))


@torch.no_grad()
def share_gradients_(gradients: Mapping[str, Tensor], codes: Mapping[str, Tensor], *, gradient: Gradient) -> None:
    """Give all weights of a cluster the same gradient, and none to those of code 0.

    ``"mean"`` averages, which keeps the step length of single weights; ``"sum"`` adds up, the gradient of the centroid
    itself (Han et al. 2016, equation 3).

    >>> grad = torch.tensor([1.0, 3.0, 5.0])
    >>> share_gradients_({"w": grad}, {"w": torch.tensor([1, 1, 0])}, gradient="sum"); grad
    tensor([4., 4., 0.])
    """
    for name, code in codes.items():
        gradients[name].copy_(_per_cluster(gradients[name], code, gradient))


def _per_cluster(values: Tensor, codes: Tensor, reduction: Gradient) -> Tensor:
    index = codes.flatten()
    clusters = int(index.max()) + 1 if index.numel() else 1
    table = cluster_means(values, index, clusters)
    if reduction == "sum":
        table *= torch.bincount(index, minlength=clusters)
    table[0] = 0.0
    return table.to(values.dtype).index_select(0, index).view(values.shape)
