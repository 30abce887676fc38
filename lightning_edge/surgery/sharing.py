"""Give the weights of a layer a small number of shared values, and keep them shared while they are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_edge.functional.sharing import Init, check_clusters
from lightning_edge.surgery.clustering import cluster_
from lightning_edge.surgery.codebooks import Codebooks, checked_importance, prices, relative_importance
from lightning_edge.surgery.selection import select_weights
from lightning_edge.surgery.shared_state import Gradient, code_entropy, project_, reassign_, share_gradient_

Clusters = int | Mapping[str, int]


@dataclass(frozen=True)
class LayerSharing:
    """Shared values of one weight tensor.

    ``clusters`` are those in use, of all codebooks together, ``inertia`` is the sum of the squared changes, and
    ``entropy_bits`` the order-0 entropy of all its codes together, zeros included.
    """

    name: str
    size: int
    zeros: int
    clusters: int
    inertia: float
    entropy_bits: float


@dataclass(frozen=True)
class ShareReport:
    """What :func:`share_weights_` did.

    ``codes`` has, per weight tensor and in its shape, 0 where the weight is zero and 1 to k for its shared value. With
    ``group_channels`` the values of group g are 1 + g k to k + g k; with ``block`` those of vector i are 1 + i block to
    block + i block. ``scales`` has, with ``channel_scale``, the float32 scale of each output channel.
    """

    layers: tuple[LayerSharing, ...]
    codes: Mapping[str, Tensor] = field(repr=False)
    scales: Mapping[str, Tensor] = field(repr=False)

    @property
    def inertia(self) -> float:
        """Sum of the squared changes of all weights."""
        return sum(layer.inertia for layer in self.layers)

    @property
    def entropy_bits(self) -> float:
        """Order-0 entropy of the codes of all layers: about what an entropy coder makes of them."""
        return sum(layer.entropy_bits for layer in self.layers)


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
    weights = select_weights(module, include=include, exclude=exclude, attention=True, embeddings=True)
    if isinstance(clusters, int):
        return {name: (weight, clusters) for name, weight in weights.items()}
    names = {id(weight): name for name, weight in weights.items()}  # of several holders of a weight the pattern may
    chosen: dict[str, tuple[nn.Parameter, int]] = {}  # match another than it is listed under
    for pattern, count in clusters.items():
        # Validates the pattern and matches class names too, exactly as include does.
        matching = select_weights(module, include=[pattern], attention=True, embeddings=True)
        found = {names[id(weight)]: (weight, count) for weight in matching.values() if id(weight) in names}
        chosen = found | chosen
    return {name: chosen[name] for name in weights if name in chosen}


@torch.no_grad()
def share_weights_(  # noqa: PLR0913 - every option once, by keyword
    module: nn.Module,
    *,
    clusters: Clusters | None = None,
    bits: int | None = None,
    init: Init = "linear",
    channel_scale: bool = False,
    rate: float = 0.0,
    group_channels: int | None = None,
    block: int = 1,
    importance: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> ShareReport:
    """Replace the weights of every selected layer by the centroids of a k-means over them (Han et al. 2016, sec. 3).

    Weights that are exactly zero stay zero and are no part of the clustering: a layer of a pruned network ends with at
    most k + 1 distinct values. Beyond the weights it takes the codes and, where zeros are left out, what is not zero
    once and its codes: at most twice the size of the largest layer, whatever k. Without zeros that also holds for
    ``importance``, ``channel_scale`` or ``block`` alone, up to 20 MB of tables aside; more of these together, and zeros
    with them, take up to a copy more for each.

    A packed file is entropy-coded, so bytes follow from how often each value is taken, not from k. With a ``rate`` a
    weight takes the value of least squared error + rate x code length (Chou, Lookabaugh, Gray 1989): at equal bytes
    this is far nearer to the weights than fewer clusters are. Give many clusters (64, 256); the rate leaves as many as
    are worth it. Useful rates are 0.005 (a layer of normal weights keeps 4.7 bits each) to 0.1 (2.2). The rate of a
    file of so many bytes is found by ``export.byte_budget.share_weights_within_``; batch norms can be folded before, by
    ``fold_batch_norms_``. What the starts come to is a table of ``benchmarks/RESULTS.md``.

    Args:
        module: The network; its selected weights are changed in place.
        clusters: Shared non-zero values of a layer, or a mapping from patterns to them (``{"conv*": 256, "fc*": 32}``).
        bits: The same said in bits: ``clusters = 2**bits``.
        init: Start of the k-means, see :func:`~lightning_edge.functional.sharing.kmeans_1d`.
        channel_scale: A weight is scale of its output channel x shared value, one float32 product. The exporter moves
            the scales behind the layer, where a batch norm takes them for nothing; ``channel_scales`` finds them
            again. Errors count relative to their channel, as behind a batch norm: the k-means is over the weights
            divided by their channel's root mean square, and values, scales and codes are fitted in turn.
        rate: Squared error that one bit may save, >= 0, as a fraction of the mean square of the layer's non-zero
            weights, times the cube root of the layer's size over 2**14: see ``surgery.codebooks.prices``. In a layer
            without any zero, the values around zero then become zero; in a pruned layer the zeros stay as they are.
        group_channels: A codebook for every so many output channels, the last may have fewer; None: one for the layer.
        block: 2 or 4: a codebook of vectors for neighbouring inputs of linear layers; ``clusters`` counts vectors. A
            vector of zeros stays one and needs no code of the codebook. Zeros of a vector that is partly zero stay too,
            so that it does not end as a vector of the codebook: prune with the pattern ``"1x2"`` or ``"1x4"``.
        importance: Squared gradients of the loss, by weight name, in the weights' shapes: the error of a weight is
            importance x its squared change, in all that is minimized here. ``rate`` is then one price for all layers,
            as a fraction of the mean of importance x weight**2 over the non-zero weights of all of them.
        include: Layers to share, globs over names or class names; the default is every linear, convolution and
            embedding layer, and the projections of attention.
        exclude: Layers to leave alone.
        generator: Source of the draws of ``init="random"`` and ``"kmeans++"``, and of the start with ``block``.

    Returns:
        Per layer the number of shared values and the squared error; codes and scales.

    Raises:
        ValueError: If an argument is out of its range, does not go with another, or a pattern matches no layer.

    >>> layer = nn.Linear(8, 4)
    >>> share_weights_(layer, clusters=3).layers[0].clusters, len(layer.weight.unique())
    (3, 3)
    """
    books = Codebooks(init, channel_scale, rate, group_channels, block)
    counts = resolve_clusters(clusters, bits)
    books.check_clusters(counts)
    selected = select_shared(module, counts, include=include, exclude=exclude)
    weights: dict[str, Tensor] = {name: weight.detach() for name, (weight, _) in selected.items()}
    books.check(module, weights)
    _check_finite(weights)
    heed = None if importance is None else checked_importance(weights, importance)
    price = prices(weights, rate, heed) if rate else {}
    layers, all_codes, all_scales = [], {}, {}
    for name, weight in weights.items():
        done = cluster_(
            weight,
            selected[name][1],
            books,
            price=price.get(name, 0.0),
            importance=_importance(weight, heed, name, channel_scale),
            generator=generator,
        )
        zeros = weight.numel() - int(torch.count_nonzero(done.codes))
        entropy = code_entropy(done.codes, block)
        layers.append(LayerSharing(name, weight.numel(), zeros, done.clusters, done.inertia, entropy))
        all_codes[name] = done.codes
        if done.scales is not None:
            all_scales[name] = done.scales
    return ShareReport(tuple(layers), all_codes, all_scales)


def project_shared_(
    weights: Mapping[str, Tensor], codes: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
) -> None:
    """Set every weight to the mean of its cluster, and those of code 0 to zero.

    With ``scales``, which change too, it becomes scale x value by least squares: the values given the scales, then the
    scales given the values.

    >>> weight = torch.tensor([1.0, 3.0, 0.5])
    >>> project_shared_({"w": weight}, {"w": torch.tensor([1, 1, 0])}); weight
    tensor([2., 2., 0.])
    """
    for name, code in codes.items():
        project_(weights[name], code, scales.get(name) if scales else None)


def share_gradients_(
    gradients: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    *,
    gradient: Gradient,
    weights: Mapping[str, Tensor] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Give all weights of a cluster the same gradient, and none to those of code 0.

    ``"mean"`` averages, which keeps the step length of single weights; ``"sum"`` adds up, the gradient of the centroid
    itself (Han et al. 2016, equation 3). With ``scales`` and ``weights`` the gradient becomes the nearest change that
    the values can make, each mean weighted by the squared scales, and of what is left the nearest that the scales can
    make; ``gradient`` is not looked at.

    >>> grad = torch.tensor([1.0, 3.0, 5.0])
    >>> share_gradients_({"w": grad}, {"w": torch.tensor([1, 1, 0])}, gradient="sum"); grad
    tensor([4., 4., 0.])
    """
    for name, code in codes.items():
        share_gradient_(
            gradients[name],
            code,
            gradient,
            weight=weights[name] if weights else None,
            scales=scales.get(name) if scales else None,
        )


def reassign_shared_(
    weights: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    hidden: Mapping[str, Tensor],
    *,
    books: Codebooks,
    scales: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Give every hidden weight the cheapest of its layer's shared values, then fit the values to the hidden weights.

    Hidden weights of zero are pruned and stay zero. A shared value that no weight takes is gone.

    Args:
        weights: The shared weights, changed in place.
        codes: Changed in place.
        hidden: The weights in full precision.
        books: What the codebooks are like; no blocks.
        scales: Of the output channels, changed in place.
        importance: Squared gradients; see :func:`share_weights_`.

    >>> weight, codes = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1, 1, 2], dtype=torch.int32)
    >>> hidden = torch.tensor([1.2, 2.6, 3.0])
    >>> reassign_shared_({"w": weight}, {"w": codes}, {"w": hidden}, books=Codebooks()); weight
    tensor([1.2000, 2.8000, 2.8000])
    """
    heed = None if importance is None else checked_importance(hidden, importance)
    price = prices(hidden, books.rate, heed) if books.rate else {}
    for name, code in codes.items():
        reassign_(
            weights[name],
            code,
            scales.get(name) if scales else None,
            hidden[name],
            books,
            price=price.get(name, 0.0),
            importance=_importance(hidden[name], heed, name, books.channel_scale),
        )


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.numel() and not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise ValueError(
                f"weights must be finite, got an infinite value or NaN in {name!r}: the network has diverged"
            )


def _importance(weight: Tensor, given: Mapping[str, Tensor] | None, name: str, channel_scale: bool) -> Tensor | None:
    if given is not None:
        return given[name]
    return relative_importance(weight) if channel_scale else None
