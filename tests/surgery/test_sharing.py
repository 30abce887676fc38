import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge import export, load_artifact, prune_, share_weights_
from lightning_edge.artifact import inspect
from lightning_edge.surgery.codebooks import Codebooks
from lightning_edge.surgery.sharing import project_shared_, reassign_shared_, share_gradients_


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


@pytest.mark.parametrize("options", [{}, {"channel_scale": True}, {"block": 2}], ids=str)
def test_attention_is_shared_in_all_its_projections(tmp_path, options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert [shared.name for shared in share_weights_(layer, clusters=8, **options).layers] == names
    export(layer, tmp_path / "layer.edge", example_inputs=(torch.randn(2, 4, 16),))
    found = {tensor.name: tensor.distinct for tensor in inspect(tmp_path / "layer.edge").tensors}
    assert all(found[name] <= 8 * options.get("block", 1) for name in names)


class Tokens(nn.Module):
    """Read tokens, and say for each what might stand in its place."""

    def __init__(self, *, tied=False, **options):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(50, 16, **options), nn.LayerNorm(16), nn.Linear(16, 50)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


@pytest.mark.parametrize(
    ("tied", "options"),
    [(tied, options) for tied in (False, True) for options in ({}, {"group_channels": 25}, {"block": 2})]
    + [(False, {"channel_scale": True})],
)
def test_embeddings_are_shared_in_the_network_and_in_its_file(tmp_path, tied, options):
    torch.manual_seed(0)
    network, tokens = Tokens(tied=tied, padding_idx=3).eval(), torch.randint(0, 50, (4, 6))
    names = ["head.weight"] if tied else ["embedding.weight", "head.weight"]
    assert [shared.name for shared in share_weights_(network, clusters=8, **options).layers] == names
    assert int(torch.count_nonzero(network.embedding.weight[3])) == 0
    path = export(network, tmp_path / "net.edge", example_inputs=(tokens,), round_small=False)
    found = {tensor.name: tensor.distinct for tensor in inspect(path).tensors}
    assert all(
        found[name] <= 1 + 8 * (50 // options.get("group_channels", 50)) * options.get("block", 1) for name in names
    )
    np.testing.assert_allclose(load_artifact(path)(tokens.numpy()), network(tokens).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_that_cannot_stay_shared_are_refused(options):
    network = Tokens(**options)
    with pytest.raises(ValueError, match=r"embedding 'embedding' must have sparse=False and max_norm=None, got "):
        share_weights_(network, clusters=4)
    assert [shared.name for shared in share_weights_(network, clusters=4, exclude=["Embedding"]).layers] == [
        "head.weight"
    ]


@pytest.mark.parametrize("pattern", ["embedding", "head", "Embedding"])
def test_a_tied_weight_takes_the_number_of_either_of_its_names(pattern):
    report = share_weights_(Tokens(tied=True), clusters={pattern: 4, "*": 8})
    assert [(shared.name, shared.clusters) for shared in report.layers] == [("head.weight", 4)]


def test_a_tied_weight_has_no_scales():
    with pytest.raises(ValueError, match=r"channel_scale must be False for a weight that two layers hold, got .*'head"):
        share_weights_(Tokens(tied=True), clusters=4, channel_scale=True)


def test_attention_takes_the_number_of_its_pattern():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    report = share_weights_(layer, clusters={"self_attn": 4, "linear?": 8})
    assert {shared.name: shared.clusters for shared in report.layers} == {
        "self_attn.in_proj_weight": 4,
        "linear1.weight": 8,
        "linear2.weight": 8,
    }


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
        ({"clusters": 4, "rate": -1.0}, "rate must be a finite number >= 0"),
        ({"clusters": 4, "group_channels": 0}, "group_channels must be a whole number >= 1 of output channels"),
        ({"clusters": 4, "block": 3}, r"block must be one of \[1, 2, 4\] neighbouring weights, got 3"),
        ({"clusters": 4, "block": 2}, r'block must be 1 for a convolution, got 2 .*0.weight.*include=\["Linear"\]'),
        ({"clusters": 4, "block": 2, "rate": 0.1}, "rate must be 0 with block=2"),
        ({"clusters": 4, "block": 2, "init": "optimal"}, "init must be 'linear' with block=2, got 'optimal'"),
        ({"clusters": 4, "block": 2, "group_channels": 2}, "group_channels must be None with block=2, got 2"),
        ({"clusters": 4, "channel_scale": True, "group_channels": 2}, "group_channels must be None with channel_scale"),
        ({"clusters": {"*": 257}, "channel_scale": True}, "clusters must be at most 256 with channel_scale, got 257"),
        ({"bits": 9, "channel_scale": True}, "clusters must be at most 256 with channel_scale, got 512"),
        ({"clusters": 4, "importance": {}}, r"importance must have the shape \(8, 2, 3, 3\) for '0.weight', got none"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        share_weights_(net(), **arguments)


def test_vectors_that_do_not_fill_a_row_are_refused():
    with pytest.raises(ValueError, match="block must divide the inputs of a layer, got 4 and 6 inputs of 'weight'"):
        share_weights_(nn.Linear(6, 8), clusters=2, block=4)


def test_transposed_convolutions_have_no_rows_of_one_channel():
    with pytest.raises(ValueError, match="channel_scale and group_channels must be left out for transposed convolu"):
        share_weights_(nn.ConvTranspose2d(2, 3, 3), clusters=4, channel_scale=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_need_more_bits_than_halves_have(dtype):
    layer = nn.Linear(8, 8).to(dtype)
    with pytest.raises(ValueError, match=f"channel_scale must be False for weights of {dtype}, got True and 'weight'"):
        share_weights_(layer, clusters=4, channel_scale=True)


@pytest.mark.parametrize("channel_scale", [True, False])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_of_a_network_that_diverged_are_refused(number, channel_scale):
    network = net()
    with torch.no_grad():
        network[0].weight[1, 1, 1, 1] = number
    with pytest.raises(ValueError, match=r"weights must be finite, got an infinite value or NaN in '0\.weight'"):
        share_weights_(network, clusters=4, channel_scale=channel_scale)


def test_importance_must_be_finite():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="importance must be finite and >= 0, got another number for 'weight'"):
        share_weights_(layer, clusters=2, importance={"weight": torch.full((4, 4), -1.0)})


def test_the_entropy_is_that_of_the_codes():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 2.0]]))
    report = share_weights_(layer, clusters=2)
    assert report.entropy_bits == report.layers[0].entropy_bits == pytest.approx(4 * 1 + 2 * 2 + 2 * 2)


def test_every_group_of_channels_is_shared_as_if_it_were_alone():
    model = net()
    masks = prune_(model, sparsity=0.4).masks
    alone = [nn.Linear(18, 3, bias=False) for _ in range(3)]
    rows = model[0].weight.detach().flatten(1)
    report_rows = []
    for index, layer in enumerate(alone):
        layer.weight = nn.Parameter(rows[3 * index : 3 * index + 3].clone())
        share_weights_(layer, clusters=4, init="optimal")
        report_rows.append(layer.weight.detach())
    report = share_weights_(model, clusters=4, init="optimal", group_channels=3)
    assert torch.equal(model[0].weight.detach().flatten(1), torch.cat(report_rows))
    codes = report.codes["0.weight"]
    assert torch.equal(codes > 0, masks["0.weight"])
    assert [codes[part].unique().tolist() for part in (slice(3), slice(3, 6), slice(6, 8))] == [
        [0, 1, 2, 3, 4],
        [0, 5, 6, 7, 8],
        [0, 9, 10, 11, 12],
    ]


def test_vectors_are_shared_whole_and_zeros_stay():
    torch.manual_seed(0)
    layer = nn.Linear(16, 32)
    with torch.no_grad():
        layer.weight[:, :4] = 0.0
        layer.weight[0, 5] = 0.0
    zero = layer.weight == 0
    report = share_weights_(layer, clusters=6, block=4, generator=torch.Generator().manual_seed(0))
    vectors, codes = layer.weight.detach().view(-1, 4), report.codes["weight"].view(-1, 4)
    assert torch.equal(layer.weight == 0, zero)
    assert torch.equal(codes == 0, zero.view(-1, 4))
    assert len(vectors.unique(dim=0)) == 6 + 1 + 1  # the zero vector, and the one that is partly zero
    assert torch.equal(((codes - 1) % 4)[codes > 0], torch.arange(4).expand(128, 4)[codes > 0])
    assert report.layers[0].clusters == 6
    counts = torch.bincount((codes.amax(1) + 3) // 4).double()
    assert report.entropy_bits == pytest.approx(float(-(counts * (counts / 128).log2()).sum()))


def rows_of_different_size():
    torch.manual_seed(0)
    layer = nn.Linear(60, 40, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 0, 40)[:, None])
    return layer


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_weight_is_the_product_of_its_channels_scale_and_its_value(rate, sparsity):
    layer = rows_of_different_size()
    zero = torch.rand(40, 60) < sparsity
    with torch.no_grad():
        layer.weight.masked_fill_(zero, 0.0)
    report = share_weights_(layer, clusters=16, rate=rate, channel_scale=True)
    codes, scales, weight = report.codes["weight"], report.scales["weight"], layer.weight.detach()
    values = torch.zeros(int(codes.max()) + 1)
    for code in codes[codes > 0].unique().tolist():  # one product must explain all weights of a code
        row, column = divmod(int(weight.abs().mul(codes == code).argmax()), 60)
        guess = weight[row, column] / scales[row]
        ulps = [guess, torch.nextafter(guess, guess + 1), torch.nextafter(guess, guess - 1)]
        mine = codes == code
        fits = [u for u in ulps if torch.equal((scales[:, None] * u).expand(40, 60)[mine], weight[mine])]
        values[code] = fits[0]
    assert torch.equal(scales[:, None] * values[codes], weight)
    assert values[0] == 0.0
    assert bool((scales > 0).all())
    assert bool((weight[zero] == 0).all())


def test_scales_bring_down_the_error_of_channels_of_different_size():
    plain, scaled = (
        share_weights_(rows_of_different_size(), clusters=16, channel_scale=scale).inertia for scale in (False, True)
    )
    assert scaled < plain / 2


def test_at_equal_entropy_a_rate_is_nearer_than_fewer_clusters():
    torch.manual_seed(0)
    weight = torch.randn(100, 100)
    fewer, aware = (nn.Linear(100, 100) for _ in range(2))
    fewer.weight, aware.weight = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    few = share_weights_(fewer, clusters=4, init="optimal")
    many = share_weights_(aware, clusters=64, rate=0.19)
    assert many.entropy_bits < few.entropy_bits
    assert many.inertia < 0.9 * few.inertia


def test_a_rate_makes_zeros_in_a_dense_layer_and_none_in_a_pruned_one():
    dense, pruned = rows_of_different_size(), rows_of_different_size()
    with torch.no_grad():
        pruned.weight[:, ::2] = 0.0
    share_weights_(dense, clusters=32, rate=0.05)
    share_weights_(pruned, clusters=32, rate=0.05)
    assert int((dense.weight == 0).sum()) > 400
    assert int((pruned.weight == 0).sum()) == 40 * 30


def test_one_rate_means_the_same_relative_error_to_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 50))
    with torch.no_grad():
        model[1].weight.copy_(100 * model[0].weight.T)
    layers = share_weights_(model, clusters=32, rate=0.03).layers
    assert layers[1].entropy_bits == pytest.approx(layers[0].entropy_bits, rel=0.02)


def test_with_importance_bytes_go_where_they_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 50))
    importance = {"0.weight": torch.full((40, 50), 100.0), "1.weight": torch.ones(50, 40)}
    layers = share_weights_(model, clusters=64, rate=0.03, importance=importance).layers
    assert layers[0].entropy_bits > 2 * layers[1].entropy_bits
    assert layers[0].inertia < layers[1].inertia / 10


@pytest.mark.parametrize("options", [{}, {"channel_scale": True}, {"group_channels": 20}, {"block": 2}], ids=str)
def test_important_weights_are_met_more_closely(options):
    plain, heeded = rows_of_different_size(), rows_of_different_size()
    with torch.no_grad():
        plain.weight[:, :6] *= 0.1
        heeded.weight[:, :6] *= 0.1
    before = plain.weight.detach().clone()
    importance = torch.ones(40, 60)
    importance[:, :6] = 1000.0
    for layer, extra in ((plain, {}), (heeded, {"importance": {"weight": importance}})):
        share_weights_(layer, clusters=8, generator=torch.Generator().manual_seed(0), **options, **extra)
    errors = [(layer.weight.detach() - before).square()[:, :6].sum() for layer in (plain, heeded)]
    assert errors[1] < 0.7 * errors[0]


def test_a_layer_without_any_gradient_is_shared_too():
    model = net()
    importance = {"0.weight": torch.zeros(8, 2, 3, 3), "2.weight": torch.ones(10, 72)}
    report = share_weights_(model, clusters=5, importance=importance)
    assert [layer.clusters for layer in report.layers] == [5, 5]


def test_gradients_with_scales_are_the_nearest_change_of_values_then_of_scales():
    layer = rows_of_different_size()
    with torch.no_grad():
        layer.weight[:, 50:] = 0.0
    report = share_weights_(layer, clusters=5, channel_scale=True)
    codes, scales, weight = report.codes["weight"], report.scales["weight"], layer.weight.detach()
    gradient = torch.randn(40, 60)
    by_value = torch.stack([(scales[:, None] * (codes == code)).flatten() for code in range(1, 6)], 1).double()
    by_scale = torch.block_diag(*weight).T.double()
    expected, wanted = torch.zeros(2400, dtype=torch.float64), gradient.flatten().double()
    for directions in (by_value, by_scale):
        expected += directions @ torch.linalg.lstsq(directions, wanted - expected).solution
    share_gradients_({"w": gradient}, {"w": codes}, gradient="mean", weights={"w": weight}, scales={"w": scales})
    torch.testing.assert_close(gradient.flatten(), expected.float())
    assert not gradient[:, 50:].any()


def test_projection_with_scales_fits_the_values_and_then_the_scales():
    layer = rows_of_different_size()
    report = share_weights_(layer, clusters=5, channel_scale=True)
    codes, scales = report.codes["weight"], report.scales["weight"].clone()
    weight, before = layer.weight.detach(), layer.weight.detach().clone()
    project_shared_({"w": weight}, {"w": codes}, {"w": scales})
    torch.testing.assert_close(weight, before, rtol=1e-6, atol=0.0)
    weight *= 1 + 0.1 * torch.randn(40, 60)
    values, fitted = torch.zeros(6, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    rows = scales.double()[:, None].expand(40, 60)
    for code in range(1, 6):
        mine = codes == code
        values[code] = (rows[mine] * weight[mine]).sum() / rows[mine].square().sum()
    for row in range(40):
        fitted[row] = (values[codes[row]] * weight[row]).sum() / values[codes[row]].square().sum()
    project_shared_({"w": weight}, {"w": codes}, {"w": scales})
    torch.testing.assert_close(scales, fitted.float())
    torch.testing.assert_close(weight, (fitted[:, None] * values[codes]).float())


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_reassignment_matches_a_loop(rate):
    torch.manual_seed(0)
    hidden = torch.randn(12, 10)
    hidden[hidden.abs() < 0.3] = 0.0
    values = torch.tensor([0.0, -1.0, 0.4, 1.5])
    codes = torch.randint(1, 4, (12, 10), dtype=torch.int32) * (hidden != 0)
    weight = values[codes]
    live = hidden[hidden != 0]
    counts = torch.bincount(codes[hidden != 0], minlength=4)[1:]
    price = rate * live.square().mean()
    cost = (live[:, None] - values[1:]).square() - price * (counts / counts.sum()).log2()
    expected = torch.zeros(12, 10, dtype=torch.int32)
    expected[hidden != 0] = 1 + cost.argmin(1).int()
    reassign_shared_({"w": weight}, {"w": codes}, {"w": hidden}, books=Codebooks(rate=rate))
    assert torch.equal(codes, expected)
    for code in (1, 2, 3):
        mine = hidden[codes == code]
        torch.testing.assert_close(weight[codes == code], mine.mean().expand(len(mine)))
    assert torch.equal(weight == 0, hidden == 0)


def test_reassignment_lets_weights_of_a_dense_layer_become_zero_and_come_back():
    layer = rows_of_different_size()
    report = share_weights_(layer, clusters=32, rate=0.05)
    codes = dict(report.codes)
    weight, before = {"weight": layer.weight.detach()}, codes["weight"].clone()
    zero = before == 0
    hidden = weight["weight"].clone()
    hidden[zero] = torch.linspace(-0.1, 0.1, int(zero.sum()))
    reassign_shared_(weight, codes, {"weight": hidden}, books=Codebooks(rate=0.05))
    assert 0 < int((codes["weight"] == 0)[zero].sum()) < int(zero.sum())
    assert torch.equal(weight["weight"] == 0, codes["weight"] == 0)


def test_groups_are_reassigned_to_values_of_their_own():
    layer = rows_of_different_size()
    hidden = layer.weight.detach().clone()
    report = share_weights_(layer, clusters=4, group_channels=10)
    codes = report.codes["weight"].clone()
    noisy = hidden + 0.01 * torch.randn(40, 60)
    reassign_shared_({"w": layer.weight.detach()}, {"w": codes}, {"w": noisy}, books=Codebooks(group_channels=10))
    assert not torch.equal(codes, report.codes["weight"])
    groups = torch.arange(4).repeat_interleave(10)[:, None]
    assert torch.equal((codes - 1) // 4, groups.expand(40, 60).int())
