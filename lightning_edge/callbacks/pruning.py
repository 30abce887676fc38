"""Prune weights on a schedule while a network is trained."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.callbacks.base import (
    CompressionCallback,
    averages_of,
    require_agreement,
    state_tensors,
    stepped,
)
from lightning_edge.callbacks.inputs import NetworkInputs
from lightning_edge.callbacks.projection import Projection
from lightning_edge.callbacks.timing import Clock
from lightning_edge.functional import scores as score_functions
from lightning_edge.functional.regrowth import REGROWTHS, RigL, Splicing
from lightning_edge.functional.schedules import Schedule
from lightning_edge.surgery.pruning import Score, apply_masks_, check_score, score_masks, synflow_masks
from lightning_edge.surgery.pruning_target import Scope, Sparsity, Target
from lightning_edge.surgery.regrowth import exchange_, rewind_, splice_, state_to_rewind
from lightning_edge.surgery.selection import find_network

Regrowth = RigL | Splicing
_ACCUMULATED = {"taylor": score_functions.taylor, "movement": score_functions.movement}


class WeightPruning(CompressionCallback):
    """Set the least important weights to zero, step by step, and keep them there.

    From ``start_epoch`` to ``end_epoch`` (or ``start_step`` to ``end_step``) the schedule says how many weights are
    zero, and those of least score become so. After every optimizer step the masks are applied again, so that neither
    momentum nor weight decay revives a weight. The zeros are in the weights themselves: checkpoints stay those of the
    plain network.

    Args:
        sparsity: Final fraction of zeros among the selected weights, in [0, 1); reached exactly, in count. Or a mapping
            from layer names or globs to that of their layers; see ``prune_``.
        start_epoch: Zero-based epoch of the first decision.
        end_epoch: Epoch at whose start the target is reached; the default is ``start_epoch``, one decision.
        start_step: Instead of epochs: optimizer step (``global_step``) of the first decision.
        end_step: Optimizer step at which the target is reached; the default is ``start_step``.
        every: Epochs or steps from one decision to the next.
        schedule: ``"cubic"`` (Zhu and Gupta 2017), ``"linear"``, ``"exponential"``, ``"cosine"``, ``"multi_step"``,
            ``"ramp"``, ``"one_shot"``, an object of ``functional.schedules`` such as ``Cubic(initial=0.3)``, or a
            function from progress in [0, 1] to the reached fraction of the target.
        scope: ``"global"``, ``"layer"`` or ``"erk"``; see ``prune_``.
        pattern: ``"unstructured"``, N:M such as ``"2:4"``, or blocks such as ``"1x4"``; see ``prune_``.
        score: ``"magnitude"``; ``"lamp"``, the same made comparable between layers; ``"taylor"``, the sum of |w g| over
            the steps since the last decision; ``"movement"``, the sum of -w g over all steps; ``"snip"``, |w g| of the
            first step at ``start``; ``"synflow"``; ``"random"``; or a function from a weight to its importance. See
            ``prune_``.
        min_kept: Weights that every layer keeps at least, a number or a fraction.
        regrowth: ``RigL(...)`` or ``Splicing()`` of ``functional.regrowth``: lets pruned weights come back.
        rewind_step: After every decision, put all parameters and buffers back to their values at this optimizer step,
            clear the optimizers' states and start averages anew (Frankle et al. 2019, arXiv:1903.01611); None: go on
            from where they are. The learning rate is not rewound.
        include: Layers to prune, globs over qualified names or class names; default: every linear and convolution, and
            the projections of attention.
        exclude: Layers to leave alone.
        seed: Of ``score="random"``; the same on every rank.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If an argument is out of its range; at ``setup``, if a pattern matches nothing or the schedule ends
            after the fit; at the end of the fit, if the target was not reached.

    >>> WeightPruning(sparsity=0.9, start_epoch=0, end_epoch=12).sparsity_at(6)
    0.7875
    """

    technique: ClassVar[str] = "pruning"
    follows: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        sparsity: Sparsity,
        *,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        every: int = 1,
        schedule: str | Schedule = "cubic",
        scope: Scope = "global",
        pattern: str = "unstructured",
        score: str | Score = "magnitude",
        min_kept: int | float = 1,
        regrowth: Regrowth | None = None,
        rewind_step: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        seed: int = 0,
        network: str | None = None,
    ) -> None:
        plain = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.target = Target(plain, scope=scope, pattern=pattern, min_kept=min_kept)
        if not any(plain.values() if isinstance(plain, dict) else [plain]):
            raise ValueError("sparsity must be above 0 for a callback that prunes, got 0: it would change nothing")
        self.clock = Clock.of(
            schedule,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            start_step=start_step,
            end_step=end_step,
            every=every,
        )
        self.score = check_score(score)
        if score in _ACCUMULATED and self.clock.timeline.start == 0:
            raise ValueError(
                f"score {score!r} must see gradients before the first decision, got a schedule that starts at 0: take"
                " start_epoch=1, or start_step=100"
            )
        if score in ("snip", "synflow") and self.clock.count > 1:
            raise ValueError(f"score {score!r} must be used once, got {self.clock.count} decisions: leave the end away")
        if regrowth is not None and not isinstance(regrowth, REGROWTHS):
            raise ValueError(f"regrowth must be RigL(...), Splicing() or None, got {regrowth!r}")
        if regrowth is not None and pattern != "unstructured":
            raise ValueError(f"regrowth must be None with pattern {pattern!r}, which it would break, got {regrowth!r}")
        if rewind_step is not None and rewind_step < 0:
            raise ValueError(f"rewind_step must be at least 0, got {rewind_step}")
        self.regrowth, self.rewind_step = regrowth, rewind_step
        self.include, self.exclude, self.network = tuple(include), tuple(exclude), network
        self.seed = seed
        self.reset()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: two callbacks for different layers keep apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude, network=self.network)

    def sparsity_at(self, time: int) -> float:
        """Return the fraction of zeros that the schedule asks for from the decision at ``time`` on.

        Raises:
            ValueError: If every layer has a sparsity of its own.
        """
        if isinstance(self.target.sparsity, Mapping):
            raise ValueError("sparsity must be one number for sparsity_at, got a mapping")
        return self.target.sparsity * self.clock.progress(time)

    @property
    def ends(self) -> str:
        """The argument that says when the last decision falls."""
        if isinstance(self.regrowth, RigL):
            return "end_step of regrowth"
        return "end_step" if self.clock.in_steps else "end_epoch"

    def selected(self, network: nn.Module) -> Iterable[str]:
        """Return the names of the weights that are pruned."""
        return self._select(network)

    def decisions(self) -> tuple[int, int]:
        """Return the first and the last epoch in which the masks change."""
        first, last = self.clock.epochs(self._steps_per_epoch)
        if isinstance(self.regrowth, RigL):
            last = max(last, int(self.regrowth.end_step // self._steps_per_epoch))
        return first, last

    def knows_its_epochs(self) -> bool:
        """Return whether the epochs of the decisions are certain."""
        return not self.clock.in_steps or self._steps_per_epoch != math.inf

    def decides_in_steps(self) -> bool:
        """Return whether the masks change at steps, not at the starts of epochs."""
        return self.clock.in_steps or isinstance(self.regrowth, RigL)

    def reset(self) -> None:
        """Forget an earlier fit."""
        super().reset()
        self._masks: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._early: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._done = 0
        self._inputs = NetworkInputs()

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise unless the patterns match and the schedule ends within the fit."""
        self.target.counts(network, self._select(network))
        self.clock.check_epochs(max_epochs)

    def check_steps(self, steps: float) -> None:
        """Raise unless the schedule of steps ends within the fit, and there is something to rewind."""
        self.clock.check_steps(steps)
        if isinstance(self.regrowth, RigL) and self.regrowth.end_step > steps:
            raise ValueError(f"end_step of RigL must be at most {steps:g}, the steps of the fit, got {self.regrowth}")
        last = self.clock.timeline.end * (1 if self.clock.in_steps else self._steps_per_epoch)
        if self.rewind_step is not None and self.rewind_step >= last:
            raise ValueError(
                f"rewind_step must be below {last:g}, the optimizer step of the last decision, got {self.rewind_step}:"
                " nothing would be rewound"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the masks of a resumed run, and apply masks after every step of every optimizer."""
        super().on_fit_start(trainer, pl_module)
        network = find_network(pl_module, self.network)
        # Chosen once: a layer that is frozen later, or for a moment (toggle_optimizer), stays one of them.
        weights = self._weights = self._select(network)
        for kept in (self._masks, self._scores, self._hidden):
            if kept:
                kept.update(state_tensors("WeightPruning", kept, weights))
        self._projection = Projection(self._hidden if isinstance(self.regrowth, Splicing) else None)
        self._projection.set_masks(weights, self._masks)
        self.after_steps(trainer, self._projection)
        if self.score == "synflow":
            self._inputs.watch(network)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune what a schedule of epochs asks for."""
        if not self.clock.in_steps and (self.score != "synflow" or self._inputs):
            self._decide(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune what a schedule of steps asks for; remember the weights to rewind to."""
        if batch_idx == 0:  # what StochasticWeightAveraging put in place has values from before the masks
            self._projection()
        if self.rewind_step is not None and trainer.global_step >= self.rewind_step and not self._early:
            self._early = state_to_rewind(find_network(pl_module, self.network), self._hidden)
        if self.score == "synflow":
            self._inputs.take_from(pl_module, batch)
        if self.clock.in_steps or self.score == "synflow":
            self._decide(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Read the gradients for scores and regrowth; leave pruned weights out of the norm that clipping takes."""
        accumulate = _ACCUMULATED.get(self.score) if isinstance(self.score, str) else None
        if accumulate is not None and self._done < self.clock.count:
            for name, weight in stepped(self._weights, optimizer).items():
                assert weight.grad is not None
                score = accumulate(weight, weight.grad)
                # Anew where channels were removed since.
                same = name in self._scores and self._scores[name].shape == score.shape
                self._scores[name] = self._scores[name].add_(score) if same else score
        if self.score == "snip":
            self._decide(trainer, pl_module, gradients=True)
        if isinstance(self.regrowth, RigL) and self._masks:
            self._exchange(trainer, pl_module, optimizer)
        # A weight that learns out of sight needs its gradient.
        if trainer.gradient_clip_val and not isinstance(self.regrowth, Splicing):
            self._projection.mask_gradients()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the reached sparsity."""
        if self._masks:
            pl_module.log("pruning/sparsity", self._reached(), on_epoch=True, sync_dist=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the fit ended before the target."""
        # The strategy may have moved the weights to the CPU by now.
        apply_masks_(self._weights, {name: mask.to(self._weights[name].device) for name, mask in self._masks.items()})
        if self._done < self.clock.count and self.must_be_done(trainer):
            timeline = self.clock.timeline
            raise ValueError(
                f"WeightPruning must reach sparsity {self.target.sparsity} at {timeline.unit} {timeline.end}, got"
                f" {self._reached():.4f} when the fit ended at epoch {trainer.current_epoch}, step"
                f" {trainer.global_step}: train longer or end the schedule earlier"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and what scores, regrowth and rewinding have gathered."""
        kept = {"masks": self._masks, "scores": self._scores, "hidden": self._hidden, "early": self._early}
        state: dict[str, Any] = {key: {n: value.clone() for n, value in held.items()} for key, held in kept.items()}
        return state | {"decisions": self._done, "inputs": self._inputs.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state_dict)
        self._masks, self._scores = dict(state_dict["masks"]), dict(state_dict["scores"])
        self._hidden, self._early = dict(state_dict["hidden"]), dict(state_dict["early"])
        self._done, self._inputs = state_dict["decisions"], NetworkInputs(state_dict["inputs"])

    def _select(self, network: nn.Module) -> dict[str, nn.Parameter]:
        # Pruning goes on with a layer that was frozen after it was pruned: in a resumed fit, or one that goes on.
        return self.target.select(network, self.include, self.exclude, trainable=not self._masks)

    def _decide(self, trainer: L.Trainer, pl_module: L.LightningModule, *, gradients: bool = False) -> None:
        """Choose new masks if a decision is due."""
        time = self.clock.now(trainer)
        taken = self.clock.taken_by(time)
        if taken <= self._done or (self.score == "snip" and not gradients):
            return
        weights = self._weights
        if self.score == "snip" and any(weight.grad is None for weight in weights.values()):
            return  # the optimizer of other weights steps first
        masks = self._choose(pl_module, progress=self.clock.progress(time))
        require_agreement(trainer, masks.values(), what="the pruning masks")
        self._done = taken
        if self.score == "taylor":
            self._scores = {}
        changed = not self._masks or any(not torch.equal(mask, self._masks[name]) for name, mask in masks.items())
        self._set_masks(trainer, pl_module, masks)
        if changed and self.rewind_step is not None and self._early and trainer.global_step > self.rewind_step:
            self._rewind(trainer, pl_module)

    @torch.no_grad()
    def _choose(self, pl_module: L.LightningModule, *, progress: float) -> dict[str, Tensor]:
        network, weights = find_network(pl_module, self.network), self._weights
        if self.score == "synflow":
            return synflow_masks(network, self.target, weights, self._inputs.example(pl_module.device))
        if self.score in _ACCUMULATED:
            if not self._scores:
                raise ValueError(
                    f"score {self.score!r} must see gradients before a decision, got none since the fit began or the"
                    " last decision: start later than the fit does, or, in steps, decide less often"
                )
            scores = {name: self._scores.get(name, torch.zeros_like(weight)) for name, weight in weights.items()}
            return self.target.masks(network, scores, progress=progress)
        # What is hidden is zero where a weight is not, and the other way round.
        seen = {name: weight + self._hidden[name] if self._hidden else weight for name, weight in weights.items()}
        for name, weight in weights.items():
            seen[name].grad = weight.grad
        # One and the same draw for every decision: random masks grow, they do not wander.
        generator = torch.Generator().manual_seed(self.seed)
        return score_masks(network, self.target, seen, self.score, progress=progress, generator=generator)

    @torch.no_grad()
    def _set_masks(self, trainer: L.Trainer, pl_module: L.LightningModule, masks: dict[str, Tensor]) -> None:
        if isinstance(self.regrowth, Splicing):
            splice_(self._weights, self._hidden, masks)
        self._masks = masks
        self._projection.set_masks(self._weights, masks)
        for network in self.networks(trainer, pl_module):
            apply_masks_(dict(network.named_parameters(remove_duplicate=False)), masks)

    def _exchange(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(self.regrowth, RigL)
        fraction = self.regrowth.fraction_at(trainer.global_step)
        if fraction:
            masks = exchange_(stepped(self._weights, optimizer), self._masks, optimizer, fraction=fraction)
            require_agreement(trainer, masks.values(), what="the pruning masks")
            self._set_masks(trainer, pl_module, masks)

    def _rewind(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go back, and let everything that has gathered since start anew: moments, averages, hidden weights."""
        for network in self.networks(trainer, pl_module):
            rewind_(network, self._early, self._masks)
        for name, hidden in self._hidden.items():
            hidden.copy_(self._early[name].masked_fill(self._masks[name], 0.0))
        for average in averages_of(trainer):
            average.n_averaged.zero_()
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def _reached(self) -> float:
        size = sum(mask.numel() for mask in self._masks.values())
        return 1.0 - sum(int(mask.count_nonzero()) for mask in self._masks.values()) / size if size else 0.0
