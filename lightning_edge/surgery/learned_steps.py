"""Step sizes that are learned beside the weights: their gradients, and what makes a step of them."""

from typing import Any

import torch
from torch import Tensor

from lightning_edge.surgery.captured import CapturedNetwork

_RATE = 1e-3  # of a step's logarithm: about a tenth of a percent a step


class LearnedSteps:
    """Adam on the logarithms of a captured network's step sizes (Esser et al. 2020, arXiv:1902.08153).

    The paper steps them with the optimizer of the weights. Here they are no parameters of the network: the user's
    optimizer, its checkpoints and DDP know nothing of them. In the log domain one learning rate fits every layer.

    Args:
        captured: A network that was captured with ``learned_steps=True``.

    Raises:
        ValueError: If its steps are not learned.
    """

    def __init__(self, captured: CapturedNetwork) -> None:
        if not captured.learned_steps:
            raise ValueError("captured must have learned steps, got fixed ones: capture_(..., learned_steps=True)")
        self._steps = [quantizer.log_clip for quantizer in captured.observers.values()]
        self._adam = torch.optim.Adam(self._steps, lr=_RATE)

    def gradients(self) -> Tensor | None:
        """Return all gradients as one vector, for ranks to average; None if nothing was computed with the steps."""
        if all(step.grad is None for step in self._steps):
            return None
        return torch.cat([torch.zeros_like(step) if step.grad is None else step.grad for step in self._steps])

    def update(self, gradients: Tensor, *, factor: float = 1.0) -> None:
        """Make a step and forget the gradients; gradients that are not finite (of a loss scaler) make none.

        Args:
            gradients: As :meth:`gradients` gives them.
            factor: On the learning rate: how far the schedule of the weights' optimizer has come down.
        """
        if bool(torch.isfinite(gradients).all()):
            sizes = [step.numel() for step in self._steps]
            for step, gradient in zip(self._steps, torch.split(gradients, sizes), strict=True):
                step.grad = gradient
            self._adam.param_groups[0]["lr"] = _RATE * factor
            self._adam.step()
        self._adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's state."""
        return self._adam.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._adam.load_state_dict(state_dict)
