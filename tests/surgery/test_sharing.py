import pytest
import torch
from torch import nn

from lightning_edge import prune_, share_weights_
from lightning_edge.surgery.sharing import project_shared_, share_gradients_


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(72, 10))


def test_a_layer_has_at_most_that_many_values():
    model = net()
    share_weights_(model, clusters=6)
    assert [len(model[i].weight.unique()) for i in (0, 2)] == [6, 6]


def test_zeros_of_a_pruned_layer_stay_and_come_on_top():
    model = net()
    masks = prune_(model, sparsity=0.8).masks
    report = share_weights_(model, bits=2)
    for i in (0, 2):
        assert torch.equal(model[i].weight != 0, masks[f"{i}.weight"])
        assert len(model[i].weight.unique()) == 5
    assert [layer.zeros for layer in report.layers] == [int((~mask).sum()) for mask in masks.values()]


def test_a_mapping_gives_each_pattern_its_number_and_leaves_the_rest_free():
    model = nn.Sequential(net(), nn.Linear(10, 40))
    before = model[1].weight.detach().clone()
    report = share_weights_(model, clusters={"0.2": 3, "Conv2d": 5})
    assert {layer.name: layer.clusters for layer in report.layers} == {"0.0.weight": 5, "0.2.weight": 3}
    assert torch.equal(model[1].weight, before)


def test_the_inertia_is_the_squared_change():
    model = net()
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    report = share_weights_(model, clusters=4)
    change = sum(
        float((model[i].weight.detach() - b).double().square().sum()) for i, b in zip((0, 2), before, strict=True)
    )
    assert report.inertia == pytest.approx(change, rel=1e-9)


def test_sharing_twice_changes_nothing():
    model = net()
    share_weights_(model, clusters=4)
    before = model[2].weight.detach().clone()
    share_weights_(model, clusters=4)
    assert torch.equal(model[2].weight, before)


def test_an_entirely_pruned_layer_stays_zero():
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    report = share_weights_(model, clusters=4)
    assert report.layers[0].clusters == 0
    assert not model[0].weight.any()


def test_projection_and_gradients_match_a_loop():
    weight, codes = torch.randn(6, 5), torch.randint(0, 4, (6, 5))
    expected_mean, expected_sum = torch.zeros_like(weight), torch.zeros_like(weight)
    for cluster in (1, 2, 3):
        expected_mean[codes == cluster] = weight[codes == cluster].double().mean().float()
        expected_sum[codes == cluster] = weight[codes == cluster].double().sum().float()
    projected, mean, total = weight.clone(), weight.clone(), weight.clone()
    project_shared_({"w": projected}, {"w": codes})
    share_gradients_({"w": mean}, {"w": codes}, gradient="mean")
    share_gradients_({"w": total}, {"w": codes}, gradient="sum")
    torch.testing.assert_close(projected, expected_mean)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(total, expected_sum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "clusters or bits must be given, one of them"),
        ({"clusters": 4, "bits": 2}, "clusters or bits must be given, one of them"),
        ({"clusters": 0}, "clusters must be a whole number >= 1"),
        ({"clusters": True}, "clusters must be a whole number >= 1"),
        ({"bits": 17}, "bits must be a whole number from 1 to 16, got 17"),
        ({"clusters": {}}, "clusters must name at least one pattern"),
        ({"clusters": {"fc*": 4}}, r"got 'fc\*', which matches none"),
        ({"clusters": 4, "init": "best"}, "init must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        share_weights_(net(), **arguments)
