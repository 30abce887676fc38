"""A classifier that also learns from its own dense self, or a larger network: what the benchmarks fine-tune with."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_edge.models import ResNet56
from lightning_edge.modules import ClassificationModule


class SelfDistilled(ClassificationModule):
    """Train with 0.1 x cross entropy + 0.9 x soft targets (Hinton et al. 2015, arXiv:1503.02531) at temperature 4.

    The teacher is the network itself with its pretrained weights: it costs one inference a step. It is no submodule, so
    checkpoints and optimizer do not know it.

    Args:
        network: A CifarResNet.
        teacher: File of its pretrained weights.
        hint_weight: Of the hints (FitNets, Romero et al. 2015, arXiv:1412.6550): mean squared distance of the outputs
            of all residual blocks from the dense network's, over their variance. Pruned channels lie inside of blocks.
        larger: File of the weights of a pretrained ResNet-56, which gives the soft targets instead.
        optimizer: As in ClassificationModule, and so what follows.
    """

    temperature = 4.0
    soft_weight = 0.9

    def __init__(
        self,
        network: nn.Module,
        *,
        teacher: str,
        hint_weight: float = 0.0,
        larger: str | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            network,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            num_classes=num_classes,
            label_smoothing=label_smoothing,
        )
        dense = pretrained(copy.deepcopy(network), teacher)
        soft = dense if larger is None else pretrained(ResNet56(), larger)
        object.__setattr__(self, "_dense", dense)
        object.__setattr__(self, "_soft", soft)
        self.hint_weight = hint_weight
        self._outputs: dict[tuple[str, int], Tensor] = {}
        for whose, blocks in (("student", network), ("dense", dense)) if hint_weight else ():
            for index, block in enumerate([*blocks.layer1, *blocks.layer2, *blocks.layer3]):
                block.register_forward_hook(partial(self._keep, (whose, index)))

    def _keep(self, place: tuple[str, int], _: nn.Module, __: object, output: Tensor) -> None:
        self._outputs[place] = output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mixed loss of the batch, in nats."""
        inputs, labels = batch
        with torch.no_grad():
            logits = self._dense(inputs) if self.hint_weight or self._soft is self._dense else None
            targets = (logits if self._soft is self._dense else self._soft(inputs)).float() / self.temperature
        logits = self(inputs).float()
        soft = F.kl_div(
            F.log_softmax(logits / self.temperature, 1),
            F.log_softmax(targets, 1),
            log_target=True,
            reduction="batchmean",
        )
        hard = F.cross_entropy(logits, labels)
        loss = (1 - self.soft_weight) * hard + self.soft_weight * self.temperature**2 * soft
        return loss + self.hint_weight * self._hints() if self.hint_weight else loss

    def _hints(self) -> Tensor:
        distances = []
        for index in range(len(self._outputs) // 2):
            own, want = self._outputs["student", index].float(), self._outputs["dense", index].float()
            distances.append(F.mse_loss(own, want) / want.var())
        return torch.stack(distances).mean()


def pretrained(network: nn.Module, weights: str) -> nn.Module:
    """Return the network with published weights, frozen."""
    state = torch.load(Path(weights), map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.eval().requires_grad_(False)
