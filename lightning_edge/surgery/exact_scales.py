"""Scales with which an integer network gives the same integers in every runtime."""

import torch
from torch import Tensor

_ACTIVATION_BITS = 7  # the smallest scale is a multiple of 129..255 of the unit: it moves by at most 0.8 %
_WEIGHT_BITS = 9  # a weight's scale moves by at most 0.2 %


def odd_multiples(scales: Tensor) -> Tensor:
    """Return the scales of activations as odd multiples m of one power of two.

    A sum of two quantized values, (m_a a + m_b b) / m_c, is then a fraction whose denominator is odd: never half-way
    between two integers, and at least 1 / (2 m_c) away from there. Runtimes compute it in float32 or in fixed point,
    with errors of 1e-5 to 1e-4, and each in its own order; without this they round a few in ten thousand values to
    different sides, which deep networks amplify until labels differ.

    Args:
        scales: Positive, shape (n,).

    Returns:
        float32 of the same shape; applied to its own result, the function changes nothing.

    >>> odd_multiples(torch.tensor([1.0, 2.003])) * 128
    tensor([129., 257.])
    """
    wide = scales.double()
    unit = torch.exp2(torch.floor(torch.log2(wide.min())) - _ACTIVATION_BITS)
    return (_nearest_odd(wide / unit) * unit).float()


def odd_requantization(weight_scales: Tensor, *, input_scale: float, output_scale: float) -> Tensor:
    """Return weight scales with which the accumulator becomes the output by a fraction of odd denominator.

    The output of a layer is round(accumulator * s_x s_w / s_y). With s_x s_w / s_y = 2**j / q, j at least 0 and q odd,
    at least 513, the product is at least 1 / (2 q) away from half-way, whatever the accumulator: far more than the
    errors of float32.

    Args:
        weight_scales: Positive, one for each output channel.
        input_scale: s_x.
        output_scale: s_y.

    Returns:
        float32 of the same shape; applied to its own result, the function changes nothing.

    >>> odd_requantization(torch.tensor([1 / 600]), input_scale=1.0, output_scale=1.0).reciprocal().round()
    tensor([599.])
    """
    inverse = output_scale / (input_scale * weight_scales.double())
    power = torch.exp2(_WEIGHT_BITS - torch.floor(torch.log2(inverse))).clamp(min=1.0)
    return (output_scale * power / (input_scale * _nearest_odd(inverse * power))).float()


def _nearest_odd(values: Tensor) -> Tensor:
    return 2 * torch.floor(values / 2) + 1
