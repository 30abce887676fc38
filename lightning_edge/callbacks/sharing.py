"""Share the weights of each layer at chosen epochs, and train the shared values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import (
    CompressionCallback,
    callbacks_of,
    require_agreement,
    state_tensors,
    stepped,
)
from lightning_edge.callbacks.inputs import NetworkInputs
from lightning_edge.callbacks.sharing_options import check_budget, check_training, epochs_of
from lightning_edge.export.byte_budget import constant_bytes, file_bytes, record_bytes, share_within
from lightning_edge.functional.sharing import Init
from lightning_edge.surgery.codebooks import Codebooks
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.shared_state import Gradient, take_step_
from lightning_edge.surgery.sharing import (
    Clusters,
    ShareReport,
    project_shared_,
    reassign_shared_,
    resolve_clusters,
    select_shared,
    share_gradients_,
    share_weights_,
)

_MOST_RATE = 0.2  # twice of what is useful
_SPARE = 500  # this part of a budget is left to what training may add


class WeightSharing(CompressionCallback):
    """Replace the weights of each layer by a few shared values, which are trained on (Han et al. 2016, section 3).

    At the start of each of ``at_epochs`` the weights of every selected layer are clustered and replaced by their
    centroids. From then on all weights of a cluster get the same gradient, and are set to their mean after every
    optimizer step. Zeros stay zeros and come on top: a pruned layer ends with at most ``clusters`` + 1 distinct values.

    With ``reassign_every`` the codes are trained too, straight through: every weight has a hidden one in full
    precision (twice the memory of the weights beyond them), which takes in what each step does to the shared one, while
    the network always computes with shared values. Every so many steps the hidden weights choose their shared values
    anew, and the values become the means of those that chose them; from ``freeze_epoch`` on the codes stay, and the
    values are trained as without it.

    Args:
        clusters: Shared non-zero values of a layer, or a mapping from patterns to them; layers of no pattern stay free.
        bits: The same said in bits: ``clusters = 2**bits``.
        at_epochs: Zero-based epochs at whose start the weights are clustered (again).
        init: Start of the k-means: ``"linear"``, ``"density"``, ``"random"``, ``"kmeans++"`` or ``"optimal"``.
        gradient: ``"mean"`` keeps the step length of single weights, ``"sum"`` is the paper's equation 3. With
            ``channel_scale`` the gradient is the nearest that values and scales can follow; see ``share_gradients_``.
        channel_scale: A weight is scale of its output channel x shared value; after every step, by least squares.
        rate: Squared error that a bit of the file may save; 0.005 to 0.1 is useful. See ``share_weights_``.
        group_channels: A codebook for every so many output channels.
        block: 2 or 4: a codebook of vectors, for linear layers.
        importance: ``"gradients"``: errors count by the squared gradients that a weight had in the epoch before the
            clustering; ``"none"``: all alike.
        reassign_every: Optimizer steps from one choice of the codes to the next; None: codes stay between clusterings.
            1 is best: in between the network stands still while the hidden weights go on, and at 20 the fine-tuning of
            a ResNet-20 diverged.
        freeze_epoch: Zero-based epoch from whose start the codes stay; the hidden weights choose once more, and are
            gone. None: never.
        max_bytes: Largest ``.edge`` file of the whole network, in bytes: the rate is found at every clustering, and
            at ``freeze_epoch``, on files as ``export`` writes them of the network at that time.
        include: Layers to share, globs over qualified names or class names; default: every linear, convolution and
            embedding, and the projections of attention.
        exclude: Layers to leave alone.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range or does not go with another; at ``setup``, if a pattern matches
            nothing or an epoch lies past ``max_epochs``; in the fit, if ``max_bytes`` is out of reach; at the end of
            the fit, if an epoch of ``at_epochs`` was not reached.

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
        channel_scale: bool = False,
        rate: float = 0.0,
        group_channels: int | None = None,
        block: int = 1,
        importance: Literal["none", "gradients"] = "none",
        reassign_every: int | None = None,
        freeze_epoch: int | None = None,
        max_bytes: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        network: str | None = None,
    ) -> None:
        self.clusters = resolve_clusters(clusters, bits)
        self.at_epochs = epochs_of(at_epochs)
        self.books = Codebooks(init, channel_scale, rate, group_channels, block)
        self.books.check_clusters(self.clusters)
        check_training(self.at_epochs, self.books, gradient, importance, reassign_every, freeze_epoch)
        check_budget(max_bytes, self.books, reassign_every, freeze_epoch)
        self.gradient, self.importance = gradient, importance
        self.reassign_every, self.freeze_epoch, self.max_bytes = reassign_every, freeze_epoch, max_bytes
        self.include, self.exclude, self.network = tuple(include), tuple(exclude), network
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: two callbacks for different layers keep apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, network=self.network)

    @property
    def begins(self) -> str:
        """The argument that says from when weights have to stay as they are."""
        return "at_epochs"

    @property
    def ends(self) -> str:
        """The argument that says when the last decision falls."""
        return "at_epochs" if self.freeze_epoch is None else "freeze_epoch"

    def selected(self, network: nn.Module) -> Iterable[str]:
        """Return the names of the weights that are shared."""
        return select_shared(network, self.clusters, include=self.include, exclude=self.exclude)

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch at whose start weights are clustered, or the codes freeze."""
        return self.at_epochs[0], self.at_epochs[-1] if self.freeze_epoch is None else self.freeze_epoch

    def reset(self) -> None:
        """Forget the codes of an earlier fit."""
        super().reset()
        self._codes: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._gathered: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}
        self._shared: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._shared_at = self._assigned_at = self._gathered_at = -1
        self._rate = self.books.rate
        self._inputs = NetworkInputs()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before any training."""
        super().setup(trainer, pl_module, stage)
        if self.books.channel_scale and any(isinstance(other, WeightAveraging) for other in callbacks_of(trainer)):
            raise ValueError(
                "channel_scale must be False beside a WeightAveraging callback, got True: an average of products of"
                " scale and value is no such product"
            )

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless the patterns match, the layers can be shared so, and every epoch lies within the fit."""
        selected = select_shared(network, self.clusters, include=self.include, exclude=self.exclude)
        self.books.check(network, {name: weight for name, (weight, _) in selected.items()})
        for name, epoch in (("at_epochs", self.at_epochs[-1]), ("freeze_epoch", self.freeze_epoch)):
            if epoch is not None and epoch >= max_epochs:
                raise ValueError(f"{name} must lie below max_epochs={max_epochs:g} (zero-based), got {epoch}")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the codes of a resumed run, and project after every step of every optimizer."""
        super().on_fit_start(trainer, pl_module)
        self._weights = self._select(pl_module)
        for kept in (self._codes, self._hidden, self._gathered, self._importance):
            if kept:
                kept.update(state_tensors("WeightSharing", kept, self._weights))
        self._scales = {name: scales.to(self._weights[name].device) for name, scales in self._scales.items()}
        self._keep_shared()
        self.after_steps(trainer, self._after_step)
        if self.max_bytes is not None:
            self._inputs.watch(find_network(pl_module, self.network))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cluster the weights when it is time; freeze the codes when it is time."""
        if self.max_bytes is None or self._inputs:
            self._cluster_if_due(trainer, pl_module)
        if self._codes:
            pl_module.log("sharing/distinct_values", float(self._distinct()), on_epoch=True, sync_dist=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Cluster now if the budget of bytes needs to know the inputs, and nothing has run before."""
        if batch_idx == 0 and not self._hidden:  # what StochasticWeightAveraging put in place is not shared
            project_shared_(self._weights, self._codes, self._scales)
        if self.max_bytes is not None:
            self._inputs.take_from(pl_module, batch)
            self._cluster_if_due(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gather squared gradients; give all weights of a cluster the same gradient."""
        own = stepped(self._weights, optimizer)
        gradients = {name: weight.grad for name, weight in own.items() if weight.grad is not None}
        if self.importance == "gradients" and trainer.current_epoch + 1 in self.at_epochs:
            self._gather(trainer.current_epoch, gradients)
        if self._codes and not self._hidden:
            share_gradients_(
                gradients,
                {name: self._codes[name] for name in gradients},
                gradient=self.gradient,
                weights=self._weights,
                scales=self._scales,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the hidden weights choose their shared values anew when it is time."""
        if self._hidden and trainer.global_step - self._assigned_at >= (self.reassign_every or 1):
            self._reassign(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before the last clustering, or its file is above the budget."""
        if self._shared_at < self.decisions()[1] and self.must_be_done(trainer):
            raise ValueError(
                f"WeightSharing must cluster at epochs {list(self.at_epochs)}, got a fit that ended at epoch"
                f" {trainer.current_epoch} with the last clustering at {self._shared_at}: train longer or share earlier"
            )
        size = self._file_bytes(pl_module) if self.max_bytes is not None and self._inputs else 0
        if size > (self.max_bytes or 0) and self.must_be_done(trainer):
            raise ValueError(
                f"max_bytes must hold at the end of the fit, got a file of {size:,} bytes for {self.max_bytes:,}: what"
                f" epoch {self._shared_at} left has grown in training; cluster once more, later, or exclude fewer"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the codes, and what further clusterings need; the shared values are in the weights."""
        kept = {
            "codes": self._codes,
            "scales": self._scales,
            "hidden": self._hidden,
            "gathered": self._gathered,
            "importance": self._importance,
        }
        state: dict[str, Any] = {key: {n: value.clone() for n, value in held.items()} for key, held in kept.items()}
        times = {"shared_at": self._shared_at, "assigned_at": self._assigned_at, "gathered_at": self._gathered_at}
        return state | times | {"rate": self._rate, "inputs": self._inputs.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state_dict)
        self._codes, self._scales = dict(state_dict["codes"]), dict(state_dict["scales"])
        self._hidden = dict(state_dict["hidden"])
        self._gathered, self._importance = dict(state_dict["gathered"]), dict(state_dict["importance"])
        self._shared_at, self._assigned_at = state_dict["shared_at"], state_dict["assigned_at"]
        self._gathered_at, self._rate = state_dict["gathered_at"], state_dict["rate"]
        self._inputs = NetworkInputs(state_dict["inputs"])

    def _select(self, pl_module: L.LightningModule) -> dict[str, nn.Parameter]:
        network = find_network(pl_module, self.network)
        chosen = select_shared(network, self.clusters, include=self.include, exclude=self.exclude)
        return {name: weight for name, (weight, _) in chosen.items()}

    def _cluster_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch == self._shared_at or epoch not in (*self.at_epochs, self.freeze_epoch):
            return
        if epoch == self.freeze_epoch and self.max_bytes is None:
            self._reassign(trainer, pl_module)
            self._shared_at = epoch
        else:
            self._cluster(trainer, pl_module)
        if epoch == self.freeze_epoch:
            self._hidden, self._importance, self._shared = {}, {}, {}

    @torch.no_grad()
    def _cluster(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = find_network(pl_module, self.network)
        originals = self._hidden
        if not originals and (self.reassign_every is not None or self.max_bytes is not None):
            originals = {name: weight.detach().clone() for name, weight in self._weights.items()}
        if self._gathered:
            self._importance, self._gathered = self._gathered, {}

        def share(rate: float) -> ShareReport:
            for name, weight in originals.items():
                self._weights[name].copy_(weight)
            return share_weights_(
                network,
                clusters=self.clusters,
                init=self.books.init,
                channel_scale=self.books.channel_scale,
                rate=rate,
                group_channels=self.books.group_channels,
                block=self.books.block,
                importance=self._importance or None,
                include=self.include,
                exclude=self.exclude,
                # Seeded by the decision, so that ranks and resumed runs draw the same.
                generator=torch.Generator().manual_seed(trainer.current_epoch),
            )

        if self.max_bytes is None:
            report = share(self._rate)
        else:
            report, self._rate = share_within(
                self.max_bytes,
                spare=self.max_bytes // _SPARE + constant_bytes(network, self._weights),
                share=share,
                record_bytes=lambda report: record_bytes(self._weights, report),
                file_bytes=lambda: self._file_bytes(pl_module),
            )
            pl_module.log("sharing/rate", self._rate, on_epoch=True, sync_dist=True)
            if self._rate > _MOST_RATE:
                rank_zero_warn(
                    f"max_bytes={self.max_bytes:,} takes a rate of {self._rate:.2g} at epoch {trainer.current_epoch};"
                    f" networks bear {_MOST_RATE:g}: prune more before, take fewer clusters, or allow more bytes"
                )
        pl_module.log("sharing/inertia", report.inertia, on_epoch=True, sync_dist=True)
        pl_module.log("sharing/entropy_bytes", report.entropy_bits / 8, on_epoch=True, sync_dist=True)
        self._codes, self._scales = dict(report.codes), dict(report.scales)
        self._shared_at = trainer.current_epoch
        if self.reassign_every is None:
            self._importance = {}
        else:
            self._hidden = originals
        self._settle(trainer, pl_module)

    @torch.no_grad()
    def _file_bytes(self, pl_module: L.LightningModule) -> int:
        return file_bytes(find_network(pl_module, self.network), self._inputs.example(pl_module.device))

    @torch.no_grad()
    def _reassign(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reassign_shared_(
            self._weights,
            self._codes,
            self._hidden,
            books=replace(self.books, rate=self._rate),
            scales=self._scales,
            importance=self._importance or None,
        )
        self._settle(trainer, pl_module)

    def _settle(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that ranks and averaged networks have the new codes too."""
        self._assigned_at = trainer.global_step
        require_agreement(
            trainer, [*self._codes.values(), *self._scales.values()], what="the codes of the shared weights"
        )
        for average in list(self.networks(trainer, pl_module))[1:]:
            project_shared_(dict(average.named_parameters(remove_duplicate=False)), self._codes)
        self._keep_shared()

    def _keep_shared(self) -> None:
        """Remember the shared values that a step starts from; without hidden weights nobody asks."""
        self._shared = {name: self._weights[name].detach().clone() for name in self._hidden}

    def _after_step(self, *_: Any) -> None:
        if not self._hidden:
            project_shared_(self._weights, self._codes, self._scales)
            return
        for name, hidden in self._hidden.items():
            take_step_(self._weights[name].detach(), self._shared[name], hidden)

    @torch.no_grad()
    def _gather(self, epoch: int, gradients: Mapping[str, Tensor]) -> None:
        if self._gathered_at != epoch:
            self._gathered = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
            self._gathered_at = epoch
        for name, gradient in gradients.items():
            # Not a number where a grad scaler is about to skip the step.
            self._gathered[name].add_(gradient.square().nan_to_num_(nan=0.0, posinf=0.0))

    def _distinct(self) -> int:
        """Return the largest number of distinct values in a layer, zero included."""
        return max(len(torch.unique(codes)) for codes in self._codes.values())
