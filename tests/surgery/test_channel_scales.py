import pytest
import torch
from torch import nn

from lightning_edge import share_weights_
from lightning_edge.surgery.channel_scales import channel_scales


def made(*, rows=24, columns=60, values=9, seed=0, sparsity=0.0):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.cat([torch.zeros(1), torch.randn(values, generator=generator)])
    codes = torch.randint(1, values + 1, (rows, columns), generator=generator)
    codes[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    scales = torch.rand(rows, generator=generator) + 0.05
    return scales, codes, codebook


def check(weight, *, values):
    found = channel_scales(weight)
    assert found is not None
    scales, codes, codebook = found
    rebuilt = scales.view(-1, *[1] * (weight.dim() - 1)) * codebook[codes]
    torch.testing.assert_close(rebuilt, weight, rtol=1e-6, atol=0.0)
    assert codebook[0] == 0.0
    assert len(codebook) <= values + 1
    assert torch.equal(codebook[1:], codebook[1:].sort().values)
    assert (scales.dtype, codes.dtype, codebook.dtype) == (torch.float32, torch.int32, torch.float32)
    assert bool((scales > 0).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_scales_are_found_of_random_products(seed, sparsity):
    scales, codes, codebook = made(seed=seed, sparsity=sparsity)
    check(scales[:, None] * codebook[codes], values=9)


def test_scales_are_found_of_a_convolution():
    scales, codes, codebook = made(columns=72)
    check((scales[:, None] * codebook[codes]).view(24, 8, 3, 3), values=9)


def test_scales_are_found_of_rows_that_are_pruned_have_one_value_or_are_negative():
    scales, codes, codebook = made()
    codes[3] = 0
    codes[4] = 5
    codes[5] = torch.where(torch.rand(60) < 0.5, 2, 0)
    negative = (codebook < 0).nonzero().flatten()
    codes[6] = negative[torch.arange(60) % len(negative)]
    weight = scales[:, None] * codebook[codes]
    check(weight, values=9)
    assert channel_scales(weight)[0][3] == 1.0


def test_scales_are_found_of_values_that_the_fullest_row_lacks():
    scales, codes, codebook = made(columns=24, values=16)
    largest = int(codebook.abs().argmax())
    codes[0][codes[0] == largest] = 1 + largest % 16
    check(scales[:, None] * codebook[codes], values=16)


def test_scales_are_found_of_rows_with_signs_that_the_fullest_row_lacks():
    scales, codes, codebook = made()
    codebook[1:] = codebook[1:].abs()
    weight = scales[:, None] * codebook[codes]
    weight[7] = -0.3
    check(weight, values=10)


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_scales_are_found_of_shared_weights(rate):
    torch.manual_seed(0)
    layer = nn.Linear(60, 40, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 0, 40)[:, None])
    report = share_weights_(layer, clusters=12, channel_scale=True, rate=rate)
    check(layer.weight.detach(), values=report.layers[0].clusters)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(20, 400, generator=torch.Generator().manual_seed(0)),
        torch.randn(20, 18, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, 5),
        torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]),
        torch.tensor([[1.0, torch.inf, 3.0, 4.0]]),
    ],
    ids=["many values", "few values", "zeros", "one codebook without scales", "infinite"],
)
def test_scales_are_none_where_there_are_none(weight):
    assert channel_scales(weight) is None


def test_scales_are_none_above_the_limit():
    scales, codes, codebook = made()
    assert channel_scales(scales[:, None] * codebook[codes], clusters_limit=8) is None
