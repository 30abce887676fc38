"""How much each weight matters: scores, of which the smallest are pruned first."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |w|: small weights matter least (Han et al. 2015, arXiv:1506.02626).

    Args:
        weight: Any shape and floating-point type.

    Returns:
        float32 scores of the same shape, at least 0.

    >>> magnitude(torch.tensor([-2.0, 1.0]))
    tensor([2., 1.])
    """
    return weight.detach().float().abs()


def lamp(weight: Tensor) -> Tensor:
    """Return w^2 / (the sum of all squares of the layer that are not smaller): magnitudes that layers can compare.

    Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning" (arXiv:2010.07611), equation 1. Within a
    layer the order is that of the magnitudes; the largest weight of each layer has 1, so no layer loses all.

    Args:
        weight: Of one layer; any shape and floating-point type.

    Returns:
        float32 scores of the same shape, in [0, 1].

    >>> lamp(torch.tensor([-2.0, 1.0, 2.0]))
    tensor([0.5000, 0.1111, 1.0000])
    """
    size, order = weight.detach().float().flatten().abs().sort(stable=True)
    squares = size.double().square_()
    not_smaller = squares.flip(0).cumsum_(0).flip(0)
    scores = torch.empty_like(size)
    scores[order] = squares.div_(not_smaller).nan_to_num_(nan=0.0).float()
    return scores.view(weight.shape)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |w g|: how much the loss changes, to first order, when the weight is set to zero.

    Molchanov et al. 2017 (arXiv:1611.06440), equation 7, and 2019 (arXiv:1906.10771), equation 8 without the square.
    One batch gives a noisy estimate: the mean over many is taken by the caller.

    Args:
        weight: Any shape and floating-point type.
        gradient: Gradient of the loss, same shape.

    Returns:
        float32 scores of the same shape, at least 0.

    Raises:
        ValueError: If the shapes differ.

    >>> taylor(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0]))
    tensor([1., 3.])
    """
    return _product(weight, gradient).abs_()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return -w g: above 0 where a step of gradient descent moves the weight away from zero.

    Sanh et al. 2020 (arXiv:2005.07683), section 4: the score is the sum over the optimizer steps, which the caller
    takes. Weights that shrink score below 0 and go first, whatever their magnitude.

    Args:
        weight: Any shape and floating-point type.
        gradient: Gradient of the loss, same shape.

    Returns:
        float32 scores of the same shape, of either sign.

    Raises:
        ValueError: If the shapes differ.

    >>> movement(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 3.0]))
    tensor([ 1., -3.])
    """
    return _product(weight, gradient).neg_()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers drawn evenly from [0, 1): the baseline that every other score has to beat.

    Args:
        weight: Tells shape and device.
        generator: Of the CPU, so that every rank and every kind of device draws the same numbers from one seed.

    Returns:
        float32 scores of the same shape, on the weight's device.

    Raises:
        ValueError: If the generator is not of the CPU.

    >>> random(torch.zeros(2), torch.Generator().manual_seed(0))
    tensor([0.4963, 0.7682])
    """
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be of the CPU, got one of {generator.device}: devices draw other numbers")
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    if weight.shape != gradient.shape:
        raise ValueError(f"gradient must have the weight's shape {tuple(weight.shape)}, got {tuple(gradient.shape)}")
    # In float32 from the start: in float16 the product of a small weight and a small gradient is zero.
    return weight.detach().float() * gradient.detach().float()
