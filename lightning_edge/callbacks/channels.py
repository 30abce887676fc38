"""Narrow a network while it is trained: whole channels go on a schedule, first to zero, then physically."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import CompressionCallback, is_trial, require_agreement
from lightning_edge.callbacks.inputs import NetworkInputs
from lightning_edge.callbacks.projection import Projection
from lightning_edge.callbacks.shapes import check_company, require_narrow, wrap_anew
from lightning_edge.callbacks.timing import Clock
from lightning_edge.functional.schedules import Schedule
from lightning_edge.surgery.channel_plan import ChannelPlan, Target, check_patterns
from lightning_edge.surgery.channel_scores import ChannelScore, score_units, unit_taylor
from lightning_edge.surgery.channels import SlimReport, check_options, narrowed_layers, remove_
from lightning_edge.surgery.coupling import unit_masks, zero_units_
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.slicing import check_states
from lightning_edge.surgery.widths import WIDTHS_KEY, load_widths_, read_widths


class ChannelPruning(CompressionCallback):
    """Set the least important channels and attention heads to zero, step by step, and remove them at the end.

    While they are zero the shapes stay: optimizers, DDP buckets and checkpoints notice nothing. At ``remove_epoch``, or
    at the end of the fit, they are removed physically; parameters stay the same objects, moments are cut alike, so
    training goes on. A checkpoint of the narrow network carries its sizes under ``"lightning_edge.widths"``: with this
    callback in the trainer, ``fit`` and ``test`` with a ``ckpt_path`` rebuild the shapes first; without it, and for
    ``load_from_checkpoint``, ``load_widths_(self.model, checkpoint)`` in the module's ``on_load_checkpoint`` does.

    Args:
        sparsity: Fraction of the removable channels that goes, in (0, 1).
        macs: Instead: fraction of the network's multiply-accumulates that may stay, in (0, 1).
        parameters: Instead: fraction of the network's parameters that may stay, in (0, 1).
        start_epoch: Zero-based epoch of the first decision.
        end_epoch: Epoch at whose start the target is reached; default: ``start_epoch``, one decision.
        start_step: Instead of epochs: optimizer step (``global_step``) of the first decision.
        end_step: Optimizer step at which the target is reached; default: ``start_step``.
        every: Epochs or steps from one decision to the next.
        remove_epoch: Epoch at whose start the channels are removed; default: at the end of the fit.
        schedule: How the target is approached, as in ``WeightPruning``.
        score: ``"l2"``, ``"l1"``, ``"taylor"`` (accumulated over the steps since the last decision), ``"bn_scale"``,
            ``"random"``, or a function; see ``slim_channels_``.
        scope: ``"global"`` compares the units of all groups, ``"layer"`` narrows all groups alike.
        round_to: Widths stay multiples of this.
        include: Layers whose outputs may be cut, globs over names or class names.
        exclude: Layers whose outputs may not be cut.
        protect_ends: Leave the outputs of the first layer alone too.
        seed: Of ``score="random"``.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range, a target out of reach, or the fit ended before the target.

    >>> ChannelPruning(macs=0.5, end_epoch=4).decisions()
    (0, 4)
    """

    technique: ClassVar[str] = "channels"
    follows: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        every: int = 1,
        remove_epoch: int | None = None,
        schedule: str | Schedule = "cubic",
        score: str | ChannelScore = "l2",
        scope: Literal["global", "layer"] = "global",
        round_to: int = 8,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        protect_ends: bool = True,
        seed: int = 0,
        network: str | None = None,
    ) -> None:
        self.target = Target(sparsity=sparsity, macs=macs, parameters=parameters)
        self.clock = Clock.of(
            schedule,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            start_step=start_step,
            end_step=end_step,
            every=every,
        )
        self.remove_epoch = remove_epoch
        if remove_epoch is not None and not self.clock.in_steps and remove_epoch < self.clock.timeline.end:
            raise ValueError(f"remove_epoch must be at least end_epoch={self.clock.timeline.end}, got {remove_epoch}")
        if score == "taylor" and self.clock.timeline.start == 0:
            raise ValueError(
                "score 'taylor' must see gradients before the first decision, got a schedule that starts at 0: take"
                " start_epoch=1, or start_step=100"
            )
        check_options(score=score, scope=scope, round_to=round_to)
        self.score, self.scope, self.round_to = score, scope, round_to
        self.include, self.exclude, self.protect_ends = tuple(include), tuple(exclude), protect_ends
        self.seed, self.network = seed, network
        self.report: SlimReport | None = None
        """After the removal: the sizes, and what was left alone and why."""
        self.reset()

    @property
    def ends(self) -> str:
        """The argument that says when the last change comes."""
        if self.remove_epoch is not None:
            return "remove_epoch"
        return "end_step" if self.clock.in_steps else "end_epoch"

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch in which channels go."""
        first, last = self.clock.epochs(self._steps_per_epoch)
        return first, last if self.remove_epoch is None else self.remove_epoch

    def knows_its_epochs(self) -> bool:
        """Return whether the epochs of the decisions are certain."""
        return not self.clock.in_steps or self._steps_per_epoch != math.inf

    def decides_in_steps(self) -> bool:
        """Return whether the last change comes at a step, not at the start of an epoch."""
        return self.clock.in_steps and self.remove_epoch is None

    def reset(self) -> None:
        """Forget an earlier fit."""
        super().reset()
        self.report = None
        self._inputs = NetworkInputs()
        self._plan: ChannelPlan | None = None
        self._kept: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._done = 0
        self._manifest: dict[str, dict[str, int]] = {}

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless the patterns match and the schedule ends within the fit."""
        check_patterns(network, include=self.include, exclude=self.exclude)
        self.clock.check_epochs(max_epochs)
        if self.remove_epoch is not None and self.remove_epoch >= max_epochs:
            raise ValueError(
                f"remove_epoch must be below max_epochs={max_epochs:g} (zero-based), got {self.remove_epoch}"
            )

    def check_steps(self, steps: float) -> None:
        """Raise unless the schedule of steps ends within the fit."""
        self.clock.check_steps(steps)

    def narrows(self, network: nn.Module, layers: Sequence[str], example_inputs: tuple[Tensor, ...]) -> list[str]:
        """Return which of the layers may lose channels of their outputs while the fit goes on."""
        if self.remove_epoch is None:
            return []
        plan = self._plan_of(network, example_inputs)
        return narrowed_layers(network, plan, layers, example_inputs)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and rebuild the shapes of a checkpoint of a narrow network before it is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_company(trainer, self, remove_epoch=self.remove_epoch)
        hook = partial(self._load_widths, pl_module)
        pl_module.on_load_checkpoint = hook  # type: ignore[method-assign]  # `teardown` takes it away

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own hook back."""
        super().teardown(trainer, pl_module, stage)
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the masks of a resumed run; zero the units again after every step of every optimizer."""
        super().on_fit_start(trainer, pl_module)
        vars(pl_module).pop("on_load_checkpoint", None)
        network = find_network(pl_module, self.network)
        self._projection = Projection()
        self.after_steps(trainer, self._projection)
        if self._manifest:
            return
        if self._kept:
            self._trace(pl_module)
            self._project(network)
        self._inputs.watch(network)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide, where the network's inputs are known by now; remove what is zero when it is time."""
        check_company(trainer, self, remove_epoch=self.remove_epoch)
        if self._inputs and not self.clock.in_steps and self._is_due(trainer):
            self._decide(trainer, pl_module)
        if self.remove_epoch is not None and trainer.current_epoch >= self.remove_epoch:
            self._remove(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide on a schedule of steps, and at the very first batch of a fit that nothing ran before."""
        if self._is_due(trainer):
            self._inputs.take_from(pl_module, batch)
            self._decide(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add to the Taylor scores; leave zeroed units out of the norm that gradient clipping takes."""
        if self.score == "taylor" and self._done < self.clock.count and self._inputs:
            self._accumulate(pl_module)
        if trainer.gradient_clip_val:
            self._projection.mask_gradients()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left; refuse an optimizer whose states cannot be cut, before more is spent on training."""
        if not self._manifest:
            check_states(find_network(pl_module, self.network), trainer.optimizers)
        if self._plan is not None and self._kept and not self._manifest:
            kept = list(self._kept.values())
            dense = self._plan.macs([torch.ones(len(mask)) for mask in kept])
            pl_module.log("channels/macs", self._plan.macs(kept) / dense, sync_dist=True)
            units = sum(len(mask) for mask in kept)
            pl_module.log("channels/sparsity", 1 - sum(int(mask.sum()) for mask in kept) / units, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what is zero; raise if the fit ended before the target."""
        if self._done < self.clock.count and not self._manifest and self.must_be_done(trainer):
            timeline = self.clock.timeline
            raise ValueError(
                f"ChannelPruning must reach its target at {timeline.unit} {timeline.end}, got a fit that ended at epoch"
                f" {trainer.current_epoch}, step {trainer.global_step}: train longer or end the schedule earlier"
            )
        if self._kept and not is_trial(trainer):
            self._remove(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the sizes of a narrow network into its checkpoint."""
        if self._manifest:
            checkpoint[WIDTHS_KEY] = self._manifest

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, the scores so far, and what the network is called with."""
        return {
            "kept": {name: mask.clone() for name, mask in self._kept.items()},
            "scores": {name: score.clone() for name, score in self._scores.items()},
            "decisions": self._done,
            "inputs": self._inputs.state(),
            "manifest": self._manifest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state_dict)
        self._kept, self._scores = dict(state_dict["kept"]), dict(state_dict["scores"])
        self._done, self._manifest = state_dict["decisions"], state_dict["manifest"]
        self._inputs = NetworkInputs(state_dict["inputs"])

    def _is_due(self, trainer: L.Trainer) -> bool:
        return not self._manifest and self.clock.taken_by(self.clock.now(trainer)) > self._done

    def _decide(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the units that stay from now on."""
        time = self.clock.now(trainer)
        network = find_network(pl_module, self.network)
        plan = self._plan or self._trace(pl_module)
        # One and the same draw for every decision: what is random grows, it does not wander.
        generator = torch.Generator().manual_seed(self.seed)
        scores = [self._score(network, group, generator) for group in plan.groups]
        before = [self._kept[group.name] for group in plan.groups] if self._kept else None
        progress = self.clock.progress(time)
        kept = plan.kept(self.target, scores, progress=progress, scope=self.scope, before=before)
        require_agreement(trainer, kept, what="the channels that stay")
        self._kept = {group.name: mask for group, mask in zip(plan.groups, kept, strict=True)}
        self._scores, self._done = {}, self.clock.taken_by(time)
        for copy in self.networks(trainer, pl_module):
            zero_units_(copy, plan.groups, kept)
        self._project(network)

    def _score(self, network: nn.Module, group: Any, generator: torch.Generator) -> Tensor:
        if self.score != "taylor":
            return score_units(network, group, self.score, generator=generator)
        if group.name not in self._scores:
            raise ValueError(
                "score 'taylor' must see gradients before the first decision, got none at its start: begin at a later"
                " step (start_step=100) or epoch"
            )
        return self._scores[group.name]

    def _accumulate(self, pl_module: L.LightningModule) -> None:
        network = find_network(pl_module, self.network)
        for group in (self._plan or self._trace(pl_module)).groups:
            if any(p.grad is None for name in group.layers(network) for p in network.get_submodule(name).parameters()):
                continue  # of another optimizer than the one that steps
            squared = unit_taylor(network, group).square()
            self._scores[group.name] = self._scores.get(group.name, torch.zeros(())) + squared

    def _trace(self, pl_module: L.LightningModule) -> ChannelPlan:
        self._plan = self._plan_of(find_network(pl_module, self.network), self._example(pl_module))
        rank_zero_info(f"channels left alone: {self._plan.protected}")
        return self._plan

    def _plan_of(self, network: nn.Module, example_inputs: tuple[Tensor, ...]) -> ChannelPlan:
        return ChannelPlan(
            network,
            example_inputs,
            include=self.include,
            exclude=self.exclude,
            protect_ends=self.protect_ends,
            round_to=self.round_to,
        )

    def _example(self, pl_module: L.LightningModule) -> tuple[Tensor, ...]:
        return self._inputs.example(pl_module.device, generator=torch.Generator().manual_seed(0))

    def _project(self, network: nn.Module) -> None:
        assert self._plan is not None
        masks = unit_masks(network, self._plan.groups, [self._kept[group.name] for group in self._plan.groups])
        self._projection.set_masks(dict(network.named_parameters(remove_duplicate=False)), masks)

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the zeroed units out, once; the strategy wraps the narrow network anew."""
        if self._manifest or not self._kept:
            return
        network = find_network(pl_module, self.network)
        plan = self._plan or self._trace(pl_module)
        kept = [self._kept[group.name] for group in plan.groups]
        self.report = remove_(network, plan, kept, self._example(pl_module), optimizers=trainer.optimizers)
        self._manifest = self.report.manifest
        self._projection.set_masks({}, {})
        wrap_anew(trainer.strategy)
        before, after = self.report.macs
        rank_zero_info(f"channels removed: {before / 1e6:.2f} M multiply-accumulates became {after / 1e6:.2f} M")

    def _load_widths(self, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the network the sizes of the checkpoint, then call the module's own hook."""
        network = find_network(pl_module, self.network)
        require_narrow(checkpoint, network, self._manifest, owner=type(pl_module).__name__)
        load_widths_(network, checkpoint)
        if WIDTHS_KEY in checkpoint:
            self._manifest = read_widths(checkpoint[WIDTHS_KEY])
        type(pl_module).on_load_checkpoint(pl_module, checkpoint)
