"""Share the weights of each layer at chosen epochs, and train the shared values."""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import CompressionCallback, require_agreement, state_tensors
from lightning_edge.functional.sharing import Init, check_init
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.sharing import (
    Clusters,
    Gradient,
    project_shared_,
    resolve_clusters,
    select_shared,
    share_gradients_,
    share_weights_,
)

GRADIENTS = ("mean", "sum")


class WeightSharing(CompressionCallback):
    """Replace the weights of each layer by a few shared values, which are trained on (Han et al. 2016, section 3).

    At the start of each of ``at_epochs`` the weights of every selected layer are clustered and replaced by their
    centroids. From then on all weights of a cluster get the same gradient, and are set to their mean after every
    optimizer step. Zeros stay zeros and come on top: a pruned layer ends with at most ``clusters`` + 1 distinct values.

    Args:
        clusters: Shared non-zero values of a layer, or a mapping from patterns to them; layers of no pattern stay free.
        bits: The same said in bits: ``clusters = 2**bits``.
        at_epochs: Zero-based epochs at whose start the weights are clustered (again).
        init: Start of the k-means: ``"linear"``, ``"density"``, ``"random"``, ``"kmeans++"`` or ``"optimal"``.
        gradient: ``"mean"`` keeps the step length of single weights, ``"sum"`` is the paper's equation 3.
        include: Layers to share, globs over qualified names or class names; default: every linear and convolution.
        exclude: Layers to leave alone.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range; at ``setup``, if a pattern matches nothing or an epoch lies past
            ``max_epochs``; at the end of the fit, if an epoch of ``at_epochs`` was not reached.

    >>> WeightSharing(bits=5, at_epochs=[16, 20]).clusters
    32
    """

    technique: ClassVar[str] = "sharing"
    follows: ClassVar[tuple[str, ...]] = ("pruning", "channels")

    def __init__(
        self,
        clusters: Clusters | None = None,
        *,
        bits: int | None = None,
        at_epochs: Sequence[int],
        init: Init = "linear",
        gradient: Gradient = "mean",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        self.clusters = resolve_clusters(clusters, bits)
        self.at_epochs = tuple(sorted(set(at_epochs)))
        if not self.at_epochs or self.at_epochs[0] < 0:
            raise ValueError(f"at_epochs must name at least one epoch >= 0, got {list(at_epochs)}")
        check_init(init)
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {list(GRADIENTS)}, got {gradient!r}")
        self.init, self.gradient = init, gradient
        self.include, self.exclude, self.network = tuple(include), tuple(exclude), network
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: two callbacks for different layers keep apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, network=self.network)

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch at whose start weights are clustered."""
        return self.at_epochs[0], self.at_epochs[-1]

    def reset(self) -> None:
        """Forget the codes of an earlier fit."""
        super().reset()
        self._codes: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._shared_at = -1

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless the patterns match and every epoch lies within the fit."""
        select_shared(network, self.clusters, include=self.include, exclude=self.exclude)
        if self.at_epochs[-1] >= max_epochs:
            raise ValueError(
                f"at_epochs must lie below max_epochs={max_epochs:g} (zero-based), got {self.at_epochs[-1]}"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the codes of a resumed run, and project after every step of every optimizer."""
        super().on_fit_start(trainer, pl_module)
        self._weights = self._select(pl_module)
        if self._codes:
            self._codes = state_tensors("WeightSharing", self._codes, self._weights)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: project_shared_(self._weights, self._codes))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cluster the weights when it is time."""
        if trainer.current_epoch in self.at_epochs:
            report = share_weights_(
                find_network(pl_module, self.network),
                clusters=self.clusters,
                init=self.init,
                include=self.include,
                exclude=self.exclude,
                # Seeded by the decision, so that ranks and resumed runs draw the same.
                generator=torch.Generator().manual_seed(trainer.current_epoch),
            )
            self._codes, self._shared_at = dict(report.codes), trainer.current_epoch
            require_agreement(trainer, self._codes.values(), what="the codes of the shared weights")
            for network in self.networks(trainer, pl_module):
                project_shared_(dict(network.named_parameters(remove_duplicate=False)), self._codes)
            pl_module.log("sharing/inertia", report.inertia, on_epoch=True, sync_dist=True)
        if self._codes:
            pl_module.log("sharing/distinct_values", float(self._distinct()), on_epoch=True, sync_dist=True)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Give all weights of a cluster the same gradient."""
        gradients = {name: self._weights[name].grad for name in self._codes}
        present = {name: grad for name, grad in gradients.items() if grad is not None}
        share_gradients_(present, {name: self._codes[name] for name in present}, gradient=self.gradient)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before the last clustering."""
        if self._shared_at != self.at_epochs[-1] and self.must_be_done(trainer):
            raise ValueError(
                f"WeightSharing must cluster at epochs {list(self.at_epochs)}, got a fit that ended at epoch"
                f" {trainer.current_epoch} with the last clustering at {self._shared_at}: train longer or share earlier"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the codes; the shared values are in the weights."""
        return {"codes": {name: codes.clone() for name, codes in self._codes.items()}, "shared_at": self._shared_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the codes over."""
        super().load_state_dict(state_dict)
        self._codes, self._shared_at = dict(state_dict["codes"]), state_dict["shared_at"]

    def _select(self, pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
        network = find_network(pl_module, self.network)
        chosen = select_shared(network, self.clusters, include=self.include, exclude=self.exclude)
        return {name: weight for name, (weight, _) in chosen.items()}

    def _distinct(self) -> int:
        """Return the largest number of distinct values in a layer, zero included."""
        return max(len(torch.unique(codes)) for codes in self._codes.values())
