"""Fake quantizers: they round to the numbers of the integer network, and follow the range or learn the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

from lightning_edge.surgery.exact_scales import odd_requantization
from lightning_edge.surgery.shared_integers import shared_integers

WEIGHT_BITS = (8, 4)
_CLIPS = torch.linspace(0.3, 1.0, 71)


class WeightQuantizer(FakeQuantize):  # type: ignore[misc]  # torchao has no types
    """Rounds a weight to signed integers, symmetric, with a step for each output channel.

    The step is the channel's largest magnitude of the moment, times ``exp(log_clip)``, over the largest integer: it
    follows the weight, and a batch norm in front, at every call, in evaluation too, where nothing is stored. Fixed
    steps (:attr:`fixed`) are those in ``scale``. Where 8 bits round a weight of shared values with a scale per channel,
    ``log_clip`` makes the step that of the whole codebook, so that the layer keeps few integers; see
    :mod:`lightning_edge.surgery.shared_integers`.

    Args:
        bits: 8 or 4; with 4 bits the integers are -7..7, kept in int8.
        learned: Whether ``log_clip`` gets LSQ's gradient (Esser et al. 2020, arXiv:1902.08153, eq. 3, sec. 2.2). We
            learn the step relative to the range, in the log domain, so that it keeps its meaning while weights,
            batch norms or averages move.
    """

    def __init__(self, *, bits: int = 8, learned: bool = False) -> None:
        largest = 2 ** (bits - 1) - 1
        # Not the fused module: it never takes a scale below 6.1e-5, too coarse for weights behind an unscaled input.
        super().__init__(
            observer=MovingAveragePerChannelMinMaxObserver,
            averaging_constant=1.0,  # the range is that of the weights now
            dtype=torch.int8,
            quant_min=-largest,
            quant_max=largest,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        self.bits, self.learned, self.fixed = bits, learned, False
        self.shares = bits == 8 and not learned
        self.around: tuple[float, float] | None = None
        self._stale = True
        self.log_clip = nn.Parameter(torch.zeros(0), requires_grad=learned)

    def forward(self, values: Tensor) -> Tensor:
        """Return the rounded weight."""
        if self.log_clip.numel() == 0:
            self.log_clip.data = self._first_clip(values.detach())
        if self._stale:
            self._follow(values.detach())
        if self.fixed:
            scale = self.scale
        else:
            scale = self._steps(values.detach())
            if self.observer_enabled[0] == 1:
                self._store(values.detach(), scale.detach())
        if self.fake_quant_enabled[0] == 0:
            return values
        limits = (self.quant_min, self.quant_max)
        zero_point = torch.zeros_like(scale)
        if scale.requires_grad:
            factor = _gradient_factor(values.numel() // len(scale), self.quant_max)
            return torch._fake_quantize_learnable_per_channel_affine(values, scale, zero_point, 0, *limits, factor)
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point.int(), 0, *limits)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return steps and zero points, of shape (channels,), of the ranges last seen."""
        scale, zero_point = super().calculate_qparams()
        return self.log_clip.exp() * scale, zero_point

    @torch.no_grad()
    def steps_of(self, weight: Tensor) -> Tensor:
        """Return the steps, shape (channels,), that this weight is rounded with."""
        steps: Tensor = self.scale if self.fixed else self._steps(weight)
        return steps.detach().clone()

    def follow_codebook(self) -> None:
        """Look at the next call for shared values, which training moves; their steps are those of the conversion."""
        self._stale = True

    @torch.no_grad()
    def shared(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return integers and steps of a weight of shared values, if its layer keeps few integers; None if not."""
        found = shared_integers(weight) if self.shares else None
        if found is None or self.around is None:
            return found
        return found[0], odd_requantization(found[1], input_scale=self.around[0], output_scale=self.around[1])

    @torch.no_grad()
    def _follow(self, weight: Tensor) -> None:
        self._stale = False
        found = self.shared(weight)
        if self.fixed and found is not None:
            self.scale.copy_(found[1])
        elif self.shares:
            self.log_clip.data.zero_()
            if found is not None:
                self.log_clip.data.copy_((found[1] / self._steps(weight)).log())

    def _steps(self, weight: Tensor) -> Tensor:
        largest = weight.abs().flatten(1).amax(1)
        steps: Tensor = largest * self.log_clip.exp() / self.quant_max
        return steps.clamp(min=torch.finfo(torch.float32).eps)

    def _store(self, weight: Tensor, scale: Tensor) -> None:
        low, high = torch.aminmax(weight.flatten(1), dim=1)
        observer = self.activation_post_process
        observer.min_val, observer.max_val = low, high
        self.scale, self.zero_point = scale, torch.zeros_like(scale, dtype=torch.int32)

    def _first_clip(self, weight: Tensor) -> Tensor:
        """Eight bits cover the range; fewer start where the squared error of the channel is smallest.

        The paper starts at 2 mean|w| / sqrt(q_max), which fits two bits and is five times too coarse at eight.
        """
        clip = weight.new_zeros(len(weight))
        if self.bits == 8:
            return clip
        rows = weight.flatten(1)
        steps = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps) / self.quant_max
        best = torch.full_like(clip, torch.inf)
        for candidate in _CLIPS.tolist():
            step = steps * candidate
            error = ((rows / step).round().clamp(self.quant_min, self.quant_max) * step - rows).square().sum(1)
            clip = torch.where(error < best, math.log(candidate), clip)
            best = torch.minimum(error, best)
        return clip


class ActivationQuantizer(FakeQuantize):  # type: ignore[misc]  # as above
    """Rounds an activation to int8, with a moving average of the ranges seen in training.

    The step is that of the range times ``exp(log_clip)``, with the same zero point.

    Args:
        name: Of the operator that makes it, for messages.
        learned: As for :class:`WeightQuantizer`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, name: str = "", *, learned: bool = False) -> None:
        super().__init__(
            observer=MovingAverageMinMaxObserver,
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            eps=2**-12,  # XNNPACK's limit on the ratio of scales
        )
        self.name, self.learned, self.fixed = name, learned, False
        self.log_clip = nn.Parameter(torch.zeros(1), requires_grad=learned)

    def forward(self, values: Tensor) -> Tensor:
        """Return the rounded activation, of its own type: under autocast ranges and rounding are those of float32."""
        wide, observing, rounding = values.float(), self.observer_enabled[0] == 1, self.fake_quant_enabled[0] == 1
        if observing:
            self.activation_post_process(wide.detach())
        if not (observing or rounding):
            return values
        scale, zero_point = (self.scale, self.zero_point) if self.fixed else self.calculate_qparams()
        if observing:
            self.scale, self.zero_point = scale.detach(), zero_point.to(torch.int32)
        if not rounding:
            return values
        return self._rounded(wide, scale, zero_point).to(values.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return step and zero point, of shape (1,), of the range and the clip as they are now.

        Raises:
            ValueError: If NaN was seen.
        """
        try:
            scale, zero_point = super().calculate_qparams()
        except AssertionError as error:  # torchao's: a minimum that is not below the maximum
            raise ValueError(
                f"activations must be numbers to be quantized, got NaN at {self.name!r}: has training diverged? A lower"
                " learning rate or gradient_clip_val keeps it from that"
            ) from error
        return self.log_clip.exp() * scale, zero_point

    def _rounded(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        limits = (self.quant_min, self.quant_max)
        if values.is_cpu:
            zero = int(zero_point)
            rounded: Tensor = _Rounding.apply(  # type: ignore[no-untyped-call]  # torch's has no types
                values, scale, self.quant_min - zero, self.quant_max - zero
            )
            return rounded
        if scale.requires_grad:
            factor = _gradient_factor(values.numel(), self.quant_max)
            return torch._fake_quantize_learnable_per_tensor_affine(values, scale, zero_point.float(), *limits, factor)
        return torch.fake_quantize_per_tensor_affine(values, scale, zero_point.int(), *limits)


class _Rounding(torch.autograd.Function):
    """Multiples of a step, and the straight-through gradient: 1 within the limits, 0 beyond.

    The same as torch's fake quantization, whose kernels on the CPU take one value after the other: these operators take
    about a seventh of the time. The gradient of the step is that of Esser et al. 2020, eq. 3: with ``q`` the integers
    and ``u = values / scale``, it is the sum over ``gradient * (q - u)`` within the limits and ``gradient * q`` beyond.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        """Return ``values`` at the nearest of the multiples ``low`` to ``high`` of ``scale``, shape (1,)."""
        ctx.rounding = (float(scale), low, high)
        ctx.save_for_backward(values)  # not the result, which an operator in place may change
        return _nearest(values, *ctx.rounding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values and step."""
        (gradient,), (values,), (step, low, high) = gradients, ctx.saved_tensors, ctx.rounding
        learned = ctx.needs_input_grad[1]
        margin = 0.0 if learned else 0.5  # what rounds to a limit is within for torch, not for the paper
        passed = torch.ops.aten.hardtanh_backward(gradient, values, (low - margin) * step, (high + margin) * step)
        if not learned:
            return passed, None, None, None
        factor = _gradient_factor(values.numel(), (high - low) // 2)
        of_step = (gradient * _nearest(values, step, low, high)).sum() - (passed * values).sum()
        return passed, of_step.mul_(factor / step).reshape(1), None, None


def _nearest(values: Tensor, step: float, low: int, high: int) -> Tensor:
    return values.mul(1.0 / step).round_().clamp_(low, high).mul_(step)


Quantizer = WeightQuantizer | ActivationQuantizer


def _gradient_factor(count: int, largest: int) -> float:
    """Return 1 / sqrt(N q_max), which balances the updates of steps and weights (Esser et al. 2020, sec. 2.2)."""
    return 1.0 / math.sqrt(max(count, 1) * largest)
