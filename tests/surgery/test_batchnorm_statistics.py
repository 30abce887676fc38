import pytest
import torch
from mobile_network import digits, errors, trained
from torch import nn

from lightning_edge import prune_, quantize
from lightning_edge.surgery.batchnorm_statistics import reestimate_batch_norms_
from lightning_edge.surgery.quantization import convert


def test_it_repairs_a_pruned_network():
    network = trained()
    prune_(network, sparsity=0.3)
    before = errors(network)
    report = reestimate_batch_norms_(network, digits(), batches=None)
    assert report.rows == 1018
    assert errors(network) < 0.5 * before
    assert max(report.shifts.values()) > 0.1


def test_statistics_are_those_of_all_batches_together():
    torch.manual_seed(0)
    batches = [3 * torch.randn(64, 2, 4, 4) + index for index in range(3)]
    network = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3))
    reestimate_batch_norms_(network, batches)
    everything = torch.cat(batches)
    torch.testing.assert_close(network[0].running_mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(network[0].running_var, everything.var((0, 2, 3)), rtol=1e-3, atol=0)
    assert network[0].momentum == 0.3
    assert int(network[0].num_batches_tracked) == 0


def test_modes_weights_and_dropout_stay():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    network[1].eval()
    flags = [module.training for module in network.modules()]
    weight, batch = network[0].weight.clone(), torch.randn(50, 3)
    reestimate_batch_norms_(network, [batch])
    assert [module.training for module in network.modules()] == flags
    assert torch.equal(network[0].weight, weight)
    # Dropout does nothing meanwhile: the second norm sees what the first one normalized.
    torch.testing.assert_close(network[3].running_mean, torch.zeros(4), rtol=0, atol=1e-5)


def test_of_an_int8_network_the_norms_see_the_rounded_weights():
    network = trained()
    quantized = quantize(network, digits())
    captured = quantized.forward
    momenta = [node.args[6] for node in captured.graph_module.graph.nodes if "batch_norm" in node.name]
    report = reestimate_batch_norms_(quantized, digits())
    assert max(report.shifts.values()) > 0
    assert momenta == [node.args[6] for node in captured.graph_module.graph.nodes if "batch_norm" in node.name]
    assert errors(quantized) <= errors(network) + 15  # of 599; which images calibrate is worth some
    images = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        live, graph = quantized(images), convert(quantized)(images)
    assert float((live - graph).abs().max()) < 0.1 * float(graph.std())


def test_the_ranges_of_folded_weights_follow_the_new_variances():
    quantized = quantize(trained(), digits())
    convolution, norm = quantized[0], quantized[1]
    with torch.no_grad():
        convolution.weight *= 10  # the old variance is now a hundredth of the right one
    reestimate_batch_norms_(quantized, digits())
    folded = convolution.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    scale = quantized.forward.observers["0.weight"].scale
    torch.testing.assert_close(scale, folded.detach().flatten(1).abs().amax(1) / 127, rtol=0.003, atol=0)
    assert quantized.forward.observers_frozen


def test_an_error_leaves_the_statistics():
    network = trained()
    before = network[1].running_mean.clone()
    with pytest.raises(ValueError, match="finite values"):
        reestimate_batch_norms_(network, [torch.full((4, 1, 8, 8), float("nan"))])
    assert torch.equal(network[1].running_mean, before)


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_a_network_without_running_statistics_is_refused(network):
    with pytest.raises(ValueError, match="module must have a batch norm with running statistics"):
        reestimate_batch_norms_(network, [torch.zeros(2, 2)])
