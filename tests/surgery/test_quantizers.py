"""Rounding of activations against torch's own operator, and against the paper's gradient written out."""

import pytest
import torch

from lightning_edge.surgery.quantizers import ActivationQuantizer, _gradient_factor


def quantizer(*, scale: float, zero_point: int, learned: bool = False) -> ActivationQuantizer:
    """Return one whose range gives this step and zero point."""
    result = ActivationQuantizer(learned=learned)
    result.disable_observer()
    result.activation_post_process.min_val = torch.tensor((-128 - zero_point) * scale)
    result.activation_post_process.max_val = torch.tensor((127 - zero_point) * scale)
    return result


def test_quantizer_of_the_tests():
    quantized = quantizer(scale=0.02, zero_point=-3)
    scale, zero_point = quantized.calculate_qparams()
    assert scale.item() == pytest.approx(0.02)
    assert zero_point.item() == -3


@pytest.mark.parametrize("zero_point", [-128, -3, 5, 127])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (5, 7), (0, 3)])
def test_values_and_gradients_are_those_of_torch(zero_point, shape):
    values = (1.5 * torch.randn(shape)).requires_grad_()
    same = values.detach().clone().requires_grad_()
    gradient = torch.randn(shape)
    quantized = quantizer(scale=0.02, zero_point=zero_point)
    rounded = quantized(values)
    rounded.backward(gradient)
    scale, zero = quantized.calculate_qparams()
    expected = torch.fake_quantize_per_tensor_affine(same, scale, zero.int(), -128, 127)
    expected.backward(gradient)
    assert torch.equal(rounded, expected)
    assert torch.equal(values.grad, same.grad)


@pytest.mark.parametrize("zero_point", [-128, -3, 5])
def test_the_gradient_of_a_learned_step_is_that_of_the_paper(zero_point):
    values = (1.5 * torch.randn(4, 3, 8, 8)).double().float().requires_grad_()
    same = values.detach().clone().double().requires_grad_()
    gradient = torch.randn(4, 3, 8, 8)
    quantized = quantizer(scale=0.02, zero_point=zero_point, learned=True)
    quantized(values).backward(gradient)
    # Esser et al. 2020, eq. 1 to 3, by automatic differentiation, the step in the log domain.
    log_clip = torch.zeros(1, dtype=torch.double, requires_grad=True)
    step = quantized.calculate_qparams()[0].detach().double() * log_clip.exp()
    scaled = (same / step).clamp(-128 - zero_point, 127 - zero_point)
    ((scaled.round() - scaled).detach() + scaled).mul(step).backward(gradient.double())
    torch.testing.assert_close(values.grad, same.grad.float())
    expected = log_clip.grad * _gradient_factor(values.numel(), 127)
    torch.testing.assert_close(quantized.log_clip.grad, expected.float(), rtol=1e-3, atol=1e-5)


def test_the_range_is_followed_before_anything_is_rounded():
    quantized = ActivationQuantizer()
    quantized.disable_fake_quant()
    values = torch.tensor([-1.0, 3.0])
    assert quantized(values) is values
    assert quantized.activation_post_process.max_val == 3.0
    assert quantized.scale.item() == pytest.approx(4 / 255)
    quantized.disable_observer()
    quantized.enable_fake_quant()
    before = quantized.scale.clone()
    quantized(100 * values)
    assert torch.equal(quantized.scale, before)
    assert quantized.activation_post_process.max_val == 3.0


def test_half_precision_is_rounded_in_single():
    quantized = quantizer(scale=0.02, zero_point=-128)
    values = torch.rand(1000).bfloat16()
    rounded = quantized(values)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, quantized(values.float()).bfloat16())


@pytest.mark.parametrize("learned", [False, True])
def test_what_is_rounded_may_be_changed_in_place(learned):
    values = torch.randn(4, 3, requires_grad=True)
    rounded = quantizer(scale=0.02, zero_point=0, learned=learned)(values)
    rounded *= 2
    rounded.sum().backward()
    assert torch.equal(values.grad, torch.where(values.abs() < 127 * 0.02, 2.0, values.grad))


def test_an_empty_batch_teaches_no_step():
    quantized = quantizer(scale=0.02, zero_point=0, learned=True)
    quantized(torch.zeros(0, 3, requires_grad=True)).sum().backward()
    assert quantized.log_clip.grad.item() == 0
