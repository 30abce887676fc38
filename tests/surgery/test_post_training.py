import copy
from fnmatch import fnmatchcase

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from lightning_edge import export, load_artifact, quantize
from lightning_edge.models import DigitsNet, ResNet20
from lightning_edge.surgery.exact_scales import odd_multiples, odd_requantization
from lightning_edge.surgery.integer_linear import DynamicIntegerLinear, integer_products_are_exact
from lightning_edge.surgery.observers import OBSERVERS, MinMaxObserver
from lightning_edge.surgery.post_training import FILES
from lightning_edge.surgery.quantization import convert, release_


def images(rows=16, seed=0):
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    net = DigitsNet()
    net(images(64))  # the norms have seen something
    return net.eval()


@pytest.mark.parametrize("observer", [*OBSERVERS, MinMaxObserver])
def test_static_int8_stays_close_and_leaves_the_network_alone(observer):
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantized = quantize(net, [images()], observer=observer)
    assert net.training
    assert "forward" not in vars(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())
    with torch.no_grad():
        expected, found = net.eval()(images(seed=1)), quantized(images(seed=1))
    assert 0 < float((found - expected).abs().max()) < 0.2 * float(expected.std())


SUFFIXES = (".onnx", ".pte", ".edge")
POSSIBLE = [(scheme, suffix) for scheme, files in FILES.items() for suffix in files]
IMPOSSIBLE = [(scheme, suffix) for scheme in FILES for suffix in SUFFIXES if suffix not in FILES[scheme]]


@pytest.mark.parametrize(("scheme", "suffix"), IMPOSSIBLE)
def test_a_scheme_is_refused_where_the_table_has_no_entry(scheme, suffix, tmp_path):
    with pytest.raises(ValueError, match=f"scheme '{scheme}', got '{suffix}'"):
        export(quantize(network(), [images()], scheme=scheme), tmp_path / f"m{suffix}", example_inputs=(images(),))


@pytest.mark.parametrize(("scheme", "suffix"), POSSIBLE)
def test_each_scheme_runs_where_the_table_says(scheme, suffix, tmp_path):
    if suffix == ".pte":
        pytest.importorskip("executorch")
    quantized, path = quantize(network(), [images()], scheme=scheme), tmp_path / f"model{suffix}"
    with torch.no_grad():
        expected = (convert(quantized) if scheme == "int8_static" else quantized)(images(seed=1)).numpy()
    found = load_artifact(export(quantized, path, example_inputs=(images(),)))(images(seed=1).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4 if scheme != "int8_dynamic" else 1e-3)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("int8_dynamic", 8), ("int8_weight_only", 8), ("int4_weight_only", 4), ("fp16", 16), ("bf16", 16)],
)
def test_files_store_no_more_bits_than_the_scheme_has(scheme, bits, tmp_path):
    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(4, 512)
    path = export(quantize(net, scheme=scheme), tmp_path / "model.onnx", example_inputs=(batch,))
    weights = 512 * 256 + 256 * 64
    scales = 4 * weights // 32 if bits == 4 else 4 * 320
    assert path.stat().st_size < weights * bits / 8 + scales + 5000
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert ("MatMulInteger" in operators) == (scheme == "int8_dynamic")


def test_sums_of_integers_are_exact_on_any_processor(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = DynamicIntegerLinear(
        torch.randint(-127, 128, (8, 96), generator=generator).to(torch.int8), torch.rand(8, generator=generator), None
    )
    rows = torch.randint(-127, 128, (5, 96), generator=generator).float()
    rows[:, 0] = 127.0
    steps = torch.tensor(127.0) / 127.5
    integers = (rows / steps).round().clamp(-128, 127)
    expected = (integers.long() @ layer.weight.long().t()).float() * steps * layer.scale
    assert torch.equal(layer(rows), expected)
    monkeypatch.setattr("lightning_edge.surgery.integer_linear.integer_products_are_exact", lambda: False)
    assert torch.equal(layer(rows), expected)


def test_weights_only_are_the_integers_of_torchao():
    torch.manual_seed(0)
    net, rows = nn.Sequential(nn.Linear(64, 8, bias=False)), torch.randn(5, 3, 64)
    for scheme, config in (
        ("int8_weight_only", IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))),
        ("int4_weight_only", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))),
        ("int8_dynamic", Int8DynamicActivationInt8WeightConfig()),
    ):
        if scheme == "int8_dynamic" and not integer_products_are_exact():
            continue  # torchao's sums are cut off on this processor
        theirs = copy.deepcopy(net)
        quantize_(theirs, config)
        ours = quantize(net, scheme=scheme, group_size=16)
        torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-5, atol=1e-5)
        assert net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4_weight_only", "int8_dynamic", "fp16", "bf16"])
def test_kept_layers_have_the_bits_they_had(scheme):
    net = network()
    quantized = quantize(net, scheme=scheme, keep=["fc1", "Conv2d"])
    for name in ("fc1", "conv1", "conv2", "conv3"):
        assert torch.equal(quantized.get_parameter(f"{name}.weight"), net.get_parameter(f"{name}.weight"))
    with torch.no_grad():
        assert not torch.equal(quantized(images()), net(images()))


def test_the_readme_s_table_says_where_each_scheme_runs(root):
    text = (root / "README.md").read_text()
    for scheme, files in FILES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{scheme}`"))
        assert [suffix for suffix in (".onnx", ".pte", ".edge") if f"`{suffix}`" in row] == [*files]


def test_integer_files_give_the_very_numbers_of_the_graph(tmp_path):
    torch.manual_seed(0)
    net, batch = ResNet20(), torch.randn(8, 3, 32, 32)
    net(batch)
    quantized = quantize(net, [batch])
    with torch.no_grad():
        graph, live = convert(quantized)(batch), quantized(batch)
    found = load_artifact(export(quantized, tmp_path / "model.onnx", example_inputs=(batch,)))(batch.numpy())
    assert np.array_equal(found, graph.numpy())
    # The live network has biases that are not rounded to the accumulator's unit yet.
    assert float((live - graph).abs().max()) < 0.1 * float(graph.std())


def test_scales_are_odd_multiples_and_stay_near():
    scales = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    exact = odd_multiples(scales)
    unit = 2.0 ** (torch.floor(torch.log2(scales.min())) - 7)
    assert bool(((exact / unit) % 2 == 1).all())
    assert float((exact / scales - 1).abs().max()) < 0.008
    assert torch.equal(odd_multiples(exact), exact)
    weights = odd_requantization(scales, input_scale=0.3, output_scale=0.7)
    assert float((weights / scales - 1).abs().max()) < 0.002
    torch.testing.assert_close(odd_requantization(weights, input_scale=0.3, output_scale=0.7), weights)


def test_batches_of_many_shapes_calibrate(digits_module):
    net, rows = network(), TensorDataset(images(), torch.zeros(16))
    sources = [[images()], [(images(), torch.zeros(16))], DataLoader(rows, 16), digits_module]
    outputs = [quantize(net, source)(images(seed=1)) for source in sources]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.isfinite(outputs[3]).all()


@pytest.fixture
def digits_module():
    class Data:
        def setup(self, stage):
            assert stage == "fit"
            self.ready = True

        def train_dataloader(self):
            assert self.ready
            return [images(4), images(4, seed=2)]

    return Data()


def test_several_inputs_and_as_many_batches_as_asked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, left, right):
            return self.fc(left) + self.fc(right)

    seen = []

    def batches():
        for index in range(5):
            seen.append(index)
            yield torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4)

    quantized = quantize(Two(), batches(), batches=2)
    assert seen == [0, 1]
    assert quantized(torch.randn(5, 3), torch.randn(5, 3)).shape == (5, 2)


@pytest.mark.parametrize("keep", [["conv1"], ["conv2"], ["Linear"], ["conv*"]])
def test_kept_layers_stay_in_float_in_the_files_too(keep, tmp_path):
    net, batch = network(), images(64)
    quantized = quantize(net, [batch], keep=keep)
    kept = [name for name, layer in net.named_modules() if any(fits(name, layer, pattern) for pattern in keep)]
    names = {name.removesuffix(".weight") for name in quantized.forward.observers}
    assert not names & set(kept)
    assert names & {"conv1", "conv2", "conv3", "fc1", "fc2"}
    graph = convert(quantized)
    assert all(torch.equal(graph.get_parameter(f"{name}.weight"), net.get_parameter(f"{name}.weight")) for name in kept)
    with torch.no_grad():
        expected = graph(images(seed=1)).numpy()
    # onnxruntime quantizes float weights between integers by itself, if it is let: differences of a whole level then.
    found = load_artifact(export(quantized, tmp_path / "model.onnx", example_inputs=(batch,)))(images(seed=1).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)


def fits(name, layer, pattern):
    return fnmatchcase(name, pattern) or type(layer).__name__ == pattern


def test_a_copy_of_a_quantized_network_keeps_the_same_layers_in_float():
    quantized = quantize(network(), [images()], keep=["fc2"])
    twin = copy.deepcopy(quantized)
    assert twin.forward.keep == ("fc2",)
    with torch.no_grad():
        assert torch.equal(twin(images(seed=1)), quantized(images(seed=1)))


def test_the_random_state_is_left_alone():
    loader = DataLoader(TensorDataset(images(), torch.zeros(16)), 4, shuffle=True)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    quantize(network(), loader)
    torch.manual_seed(7)
    net = network()
    torch.manual_seed(7)
    quantize(net, loader)
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="scheme must be one of .* got 'int2'"):
        quantize(network(), [images()], scheme="int2")
    with pytest.raises(ValueError, match="target must be one of .* got 'tensorrt'"):
        quantize(network(), [images()], target="tensorrt")
    with pytest.raises(ValueError, match="observer must be one of"):
        quantize(network(), [images()], observer="best")
    with pytest.raises(ValueError, match="calibration must be given"):
        quantize(network())
    with pytest.raises(ValueError, match="calibration must hold at least one batch"):
        quantize(network(), [])
    with pytest.raises(ValueError, match="finite values, got NaN or infinity in batch 1"):
        quantize(network(), [images(), images() * float("nan")])
    with pytest.raises(ValueError, match="for one batch write \\[batch\\]"):
        quantize(network(), images())
    with pytest.raises(ValueError, match="batches must be a whole number, at least 1"):
        quantize(network(), [images()], batches=0)
    with pytest.raises(ValueError, match="got 1.5"):
        quantize(network(), [images()], batches=1.5)
    with pytest.raises(ValueError, match="batches of at least one row, got none in batch 1"):
        quantize(network(), [images(), images()[:0]])


def test_layers_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match="keep must match a linear or convolution layer, got 'fc9'"):
        quantize(network(), [images()], keep=["fc9"])
    with pytest.raises(ValueError, match="got the string 'fc1': write \\['fc1'\\]"):
        quantize(network(), [images()], keep="fc1")
    with pytest.raises(ValueError, match="network must have a convolution"):
        quantize(network(), [images()], keep=["*"])
    with pytest.raises(ValueError, match="keep must match a linear or convolution layer, got 'fc9'"):
        quantize(network(), scheme="fp16", keep=["fc9"])
    with pytest.raises(ValueError, match="group_size must divide in_features=256, got 48, layer 'fc1'"):
        quantize(network(), scheme="int4_weight_only", group_size=48)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        quantize(network(), scheme="int4_weight_only", group_size=0)
    with pytest.raises(ValueError, match="weights in float32, got torch.float64 in"):
        quantize(network().double(), [images()])
    with pytest.raises(ValueError, match="computed, as by weight_norm"):
        quantize(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="must have a momentum to be captured, got None .* in '1'"):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="a lone layer goes into nn.Sequential"):
        quantize(nn.Linear(4, 4), scheme="int8_weight_only")
    with pytest.raises(ValueError, match="quantizes linear layers"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), scheme="int8_dynamic")


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
def test_a_quantized_network_is_not_quantized_again(first, second):
    once = quantize(network(), [images()], scheme=first)
    with pytest.raises(ValueError, match="must be a network in float, got a DigitsNet that is quantized already"):
        quantize(once, [images()], scheme=second)


def test_networks_are_quantized_in_inference_mode_too():
    with torch.inference_mode():
        quantized = quantize(network(), [images()])
    quantized.train()(images()).sum().backward()
    assert quantized.conv1.weight.grad is not None


def test_a_single_row_without_a_batch_is_quantized_as_it_comes():
    layers, row = nn.Sequential(nn.Linear(4, 3)), torch.randn(4)
    quantized = quantize(layers, scheme="int8_dynamic")
    assert torch.equal(quantized(row), quantized(row.unsqueeze(0))[0])


class Tied(nn.Module):
    """The output layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)))


@pytest.mark.parametrize("suffix", [".onnx", ".pte"])
@pytest.mark.parametrize("scheme", [None, "int8_static"])
@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")  # an embedding does not
def test_an_embedding_that_is_tied_to_a_layer_reads_the_weight_as_it_is(suffix, scheme, tmp_path):
    if suffix == ".pte":
        pytest.importorskip("executorch")
    torch.manual_seed(0)
    net, tokens = Tied().eval(), torch.randint(0, 16, (4, 5))
    quantized = net if scheme is None else quantize(net, [tokens], scheme=scheme)
    with torch.no_grad():
        logits = quantized(tokens)
    found = load_artifact(export(quantized, tmp_path / f"tied{suffix}", example_inputs=(tokens,)))(tokens.numpy())
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-5)
    if scheme is not None:
        embedding = next(node for node in quantized.forward.graph_module.graph.nodes if "embedding" in str(node.target))
        assert embedding.args[0].op == "get_attr"


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only", "int4_weight_only"])
def test_the_projection_that_an_attention_reads_itself_stays_in_float(scheme):
    torch.manual_seed(0)
    net, batch = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    quantized = quantize(net, scheme=scheme)
    with torch.no_grad():
        found, expected = quantized(batch), net(batch)
    assert 0 < float((found - expected).abs().max()) < 0.3
    assert isinstance(quantized.self_attn.out_proj, nn.Linear)


def test_a_network_that_was_released_is_in_float():
    quantized = quantize(network(), [images()])
    release_(quantized)
    assert torch.equal(quantized(images()), network()(images()))
    quantize(quantized, [images()])
