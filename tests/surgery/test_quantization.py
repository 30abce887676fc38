import copy
import hashlib
import io

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_edge.surgery.capture import capture
from lightning_edge.surgery.quantization import CapturedNetwork, capture_, convert, deployed, release_

ATEN = torch.ops.aten


class Net(nn.Module):
    """Convolutions with and without bias, batch norms with odd settings, a residual sum, dropout, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6, eps=1e-2, momentum=0.3)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, images):
        first = F.relu(self.bn1(self.conv1(images)))
        second = F.relu(self.bn2(self.conv2(first)) + first)
        return self.fc(self.dropout(F.max_pool2d(second, 2).flatten(1)))


@pytest.fixture
def images():
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = Net()
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.2, 0.2)
        norm.running_var.uniform_(0.2, 2.0)
    return net


@pytest.fixture
def trained(network, images):
    """Captured, and three steps old."""
    captured = capture_(network, (images,))
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    return network, captured


def state_hash(network, captured):
    tensors = [*network.state_dict().values(), *captured.observer_state().values()]
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def fake_quantize(weight):
    """Symmetric per output channel, by hand."""
    scale = weight.flatten(1).abs().amax(1) / 127
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale


def norm_literals(captured):
    nodes = captured.graph_module.graph.find_nodes(op="call_function", target=ATEN.batch_norm.default)
    return [node.args[5:8] for node in nodes]


def dropout_literals(captured):
    nodes = captured.graph_module.graph.find_nodes(op="call_function", target=ATEN.dropout.default)
    return [node.args[1:] for node in nodes]


def test_eps_momentum_and_p_survive_capture_and_every_change_of_mode(network, images):
    captured = capture_(network, (images,))
    for mode in (True, False, True, False):
        network.train(mode)
        network(images)
        assert norm_literals(captured) == [(mode, 0.01, 1e-3), (mode, 0.3, 1e-2)]
        assert dropout_literals(captured) == [(0.1, mode)]
        epsilons = captured.graph_module.graph.find_nodes(op="call_function", target=ATEN.add.Scalar)
        assert [node.args[1] for node in epsilons] == [1e-3, 1e-2]


def test_evaluation_gives_the_numbers_of_a_reference_made_by_hand(network, images):
    capture_(network, (images,))
    network.eval()  # the activations have no ranges yet, so that only the weights are quantized
    first = images
    for conv, norm in ((network.conv1, network.bn1), (network.conv2, network.bn2)):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = 0 if conv.bias is None else conv.bias
        shift = norm.bias + (bias - norm.running_mean) * scale
        folded = fake_quantize(conv.weight * scale.reshape(-1, 1, 1, 1))
        second = F.conv2d(first, folded, shift, padding=1)
        first, previous = F.relu(second if conv is network.conv1 else second + first), first
    assert previous.shape == first.shape
    expected = F.linear(F.max_pool2d(first, 2).flatten(1), fake_quantize(network.fc.weight), network.fc.bias)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


def test_without_quantizers_a_training_step_is_that_of_the_plain_network(network, images):
    network.dropout.p = 0.0
    plain = copy.deepcopy(network)
    captured = capture_(network, (images,))
    for module in (network, plain):
        module.train()
    captured._follow()
    for quantizer in captured.observers.values():
        quantizer.disable_fake_quant()
    for module in (network, plain):
        module(images).square().mean().backward()
    torch.testing.assert_close(
        [p.grad for p in network.parameters()], [p.grad for p in plain.parameters()], rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_graph_shares_the_networks_tensors_and_the_network_keeps_its_names(network, images):
    keys, modules = list(network.state_dict()), [name for name, _ in network.named_modules()]
    captured = capture_(network, (images,))
    mine = dict(network.named_parameters()) | dict(network.named_buffers())
    graph = dict(captured.graph_module.named_parameters()) | dict(captured.graph_module.named_buffers())
    assert [name for name in mine if graph[name] is not mine[name]] == []
    assert list(network.state_dict()) == keys
    assert [name for name, _ in network.named_modules()] == modules


def test_evaluation_changes_no_state_and_training_does(trained, images):
    network, captured = trained
    before = state_hash(network, captured)
    for module in network.modules():
        module.training = False  # as Lightning does it, without a call of eval()
    network(5 * images)
    assert state_hash(network, captured) == before
    for module in network.modules():
        module.training = True
    network(5 * images)
    assert state_hash(network, captured) != before
    assert int(network.bn1.num_batches_tracked) == 4


def test_a_batch_norm_frozen_by_its_own_flag_stays_frozen_in_training(trained, images):
    network, captured = trained
    network.train()
    network.bn1.eval()
    statistics = network.bn1.running_mean.clone(), network.bn2.running_mean.clone()
    network(3 * images)
    assert torch.equal(network.bn1.running_mean, statistics[0])
    assert not torch.equal(network.bn2.running_mean, statistics[1])
    assert [literals[0] for literals in norm_literals(captured)] == [False, True]


def test_dropout_drops_with_the_users_probability():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Flatten(), nn.Dropout(0.1))
    nn.init.ones_(network[0].weight)
    capture_(network, (torch.ones(2, 1),))
    torch.manual_seed(0)
    dropped = (network(torch.ones(20_000, 1)) == 0).float().mean()
    assert 0.09 < float(dropped) < 0.11


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.2, training=True)


def test_capturing_keeps_the_random_state_and_every_mode(network, images):
    network.bn1.eval()
    whole = nn.Sequential(AlwaysDrops(), network)
    flags = [module.training for module in whole.modules()]
    state = torch.get_rng_state()
    capture_(whole, (images,))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in whole.modules()] == flags


def test_a_deep_copy_of_a_lightning_module_runs_its_own_copy_of_the_graph(network, images):
    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network

        def forward(self, x):
            return self.model(x)

    capture_(network, (images,))
    task = Task()
    task(images)
    twin = copy.deepcopy(task).eval()
    task.eval()
    assert isinstance(twin.model.forward, CapturedNetwork)
    assert twin.model.forward.network is twin.model
    assert torch.equal(twin(images), task(images))
    with torch.no_grad():
        twin.model.fc.weight.zero_()
        twin.model.fc.bias.zero_()
    # Zero is a value of every quantizer, so that the copy's logits are exactly zero, and the original's are not.
    assert float(twin(images).detach().abs().max()) == 0.0
    assert float(task(images).detach().abs().max()) > 0.1


def test_a_module_that_is_its_own_network_can_be_captured(images):
    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, x):
            return self.fc(x.flatten(1))

    task = Task()
    capture_(task, (images,))
    assert list(task.state_dict()) == ["fc.weight", "fc.bias"]
    assert task(images).shape == (16, 3)


def test_tensors_that_are_replaced_in_the_network_are_followed(trained, images):
    network, captured = trained
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["fc.bias"] += 1.0
    network.load_state_dict(state, assign=True)
    network.bn2.running_mean = torch.zeros(6)  # as a move to another device does with buffers
    network.train()
    network(images)
    assert captured.graph_module.fc.bias is network.fc.bias
    assert float(network.bn2.running_mean.abs().max()) > 0


def test_inputs_may_be_given_by_name(trained, images):
    network, _ = trained
    network.eval()
    assert torch.equal(network(images=images), network(images))


def test_activations_pass_unquantized_until_they_were_observed(network, images):
    captured = capture_(network, (images,))
    network.eval()
    network(images)
    assert not captured.calibrated
    assert captured.observers["images"].fake_quant_enabled.item() == 0
    assert captured.observers["conv1.weight"].fake_quant_enabled.item() == 1
    network.train()
    network(images)
    network.eval()
    network(images)
    assert captured.calibrated
    assert captured.observers["images"].fake_quant_enabled.item() == 1


def test_observers_stop_at_the_freeze_and_go_on_in_another_network(trained, images):
    network, captured = trained
    captured.freeze_observers()
    before = captured.observer_state()
    network.train()
    network(9 * images)
    torch.testing.assert_close(captured.observer_state(), before, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(before, file)
    file.seek(0)
    other = Net()
    other.load_state_dict(network.state_dict())
    capture_(other, (images,), observers=torch.load(file, weights_only=True), frozen=True)
    assert torch.equal(other.eval()(images), network.eval()(images))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_observer_states_of_another_network_are_refused(trained, change):
    _, captured = trained
    state = captured.observer_state()
    if change == "missing":
        state.pop("conv1.weight.scale")
    else:
        state["conv9.weight.scale"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"observers must have the names.*conv[19]\.weight\.scale"):
        captured.load_observer_state(state)


def test_ranges_of_two_ranks_meet_in_the_smallest_minimum_and_the_largest_maximum(trained, images):
    network, captured = trained
    other_network = copy.deepcopy(network)
    other = other_network.forward
    other_network(3 * images - 1)
    low, high = (torch.stack(pair) for pair in zip(captured.ranges(), other.ranges(), strict=True))
    for rank in (captured, other):
        rank.set_ranges(low.amin(0), high.amax(0))
    torch.testing.assert_close(captured.observer_state(), other.observer_state(), rtol=0, atol=0)
    observer = captured.observers["images"]
    width = observer.activation_post_process.max_val - observer.activation_post_process.min_val
    torch.testing.assert_close(observer.scale, (width / 255).reshape(1))
    with pytest.raises(ValueError, match="must have 21 values, got"):
        captured.set_ranges(low[0][:3], high[0][:3])


def test_the_converted_network_computes_what_evaluation_shows_and_leaves_the_live_one_alone(trained, images):
    network, captured = trained
    before = state_hash(network, captured)
    converted = convert(network)
    network.eval()
    step = float(captured.observers["linear"].scale)
    difference = (converted(images) - network(images)).detach().abs()
    assert float(difference.max()) <= 2 * step * 1.001
    assert float((difference < 0.001 * step).float().mean()) > 0.9
    assert state_hash(network, captured) == before
    assert converted(images[:3]).shape == (3, 4)  # any batch size
    shared = {id(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    assert [name for name, tensor in converted.named_buffers() if id(tensor) in shared] == []
    targets = {str(node.target) for node in converted.graph.nodes}
    assert not targets & {"aten.batch_norm.default", "aten.dropout.default", "aten.add_.Tensor"}


def test_zeros_stay_zeros_and_k_values_stay_k_integers_per_channel(network, images):
    with torch.no_grad():
        values = torch.tensor([-0.3, 0.0, 0.0, 0.1, 0.25])
        for layer in (network.conv1, network.conv2, network.fc):
            layer.weight.copy_(values[torch.randint(5, layer.weight.shape)])
    zeros = {name: getattr(network, name).weight == 0 for name in ("conv1", "conv2", "fc")}
    capture_(network, (images,))
    network(images)
    converted = convert(network)
    for name, mask in zeros.items():
        integers = converted.get_submodule(name).weight_int8
        assert torch.equal(integers == 0, mask)
        assert max(len(channel.unique()) for channel in integers) <= 4


def test_a_channel_without_weight_or_with_a_batch_norm_weight_of_zero_stays_a_number(network, images):
    with torch.no_grad():
        network.bn1.weight[2] = 0.0
        network.conv2.weight[3] = 0.0
    captured = capture_(network, (images,))
    network(images).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    network.eval()
    converted = convert(network)
    assert torch.isfinite(network(images)).all()
    torch.testing.assert_close(
        converted(images), network(images), rtol=0, atol=2.001 * float(captured.observers["linear"].scale)
    )


def test_a_lone_batch_norm_and_a_batch_norm_behind_a_linear_layer_are_converted(images):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(1, eps=0.1), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    )
    captured = capture_(network, (images,))
    for _ in range(5):
        network(images)
    network.eval()
    difference = (convert(network)(images) - network(images)).detach().abs()
    assert float(difference.max()) <= 1.001 * float(captured.observers["linear_1"].scale)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.3), (4, 3)),
        (nn.AlphaDropout(0.3), (4, 3)),
        (nn.Dropout2d(0.3), (4, 3, 2, 2)),
        (nn.RReLU(), (4, 3)),
        (nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_operator_with_a_training_flag_is_switched(layer, shape):
    _, literals = capture(nn.Sequential(layer), (torch.zeros(shape),))
    assert [(literal.owner, literal.in_training, literal.in_evaluation) for literal in literals] == [("0", True, False)]


def test_what_runs_in_training_too_whatever_the_mode_keeps_its_flag():
    assert capture(AlwaysDrops(), (torch.zeros(2, 2),))[1] == ()


def test_a_branch_on_the_mode_is_refused_with_the_operator_and_the_module():
    class Branch(nn.Module):
        def forward(self, x):
            return x.sin() if self.training else x.cos()

    with pytest.raises(ValueError, match=r"got aten\.sin\.default in training and aten\.cos\.default in .* module '0'"):
        capture_(nn.Sequential(Branch()), (torch.zeros(2, 2),))


def test_control_flow_on_values_is_refused_with_its_cause(capfd):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Branch cannot be captured as a graph.*data-dependent.*torch\.where"):
        capture_(Branch(), (torch.zeros(2, 2),))


def test_a_pickle_holds_the_plain_network_and_says_so(trained, images, tmp_path):
    network, _ = trained
    with pytest.warns(UserWarning, match="holds its plain forward: the observers are in the checkpoints"):
        torch.save(network, tmp_path / "network.pt")
    twin = torch.load(tmp_path / "network.pt", weights_only=False)
    release_(network)
    assert torch.equal(twin.eval()(images), network.eval()(images))
    capture_(copy.deepcopy(twin), (images,))


def test_a_copy_quantizes_the_same_values(trained, images):
    network, captured = trained
    network.eval()
    with captured.quantizing_only(["conv.weight"]):
        twin = copy.deepcopy(network)
        assert torch.equal(twin(images), network(images))
    assert not torch.equal(twin(images), network(images))


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, values):
        return self.layer(values) * torch.tensor([1.0, 2.0], device=values.device)


def test_literals_of_the_forward_follow_the_network_to_its_device():
    captured = capture_(Literal(), (torch.zeros(2, 2),))
    captured._move_constants(torch.device("meta"))
    literals = [value for value in vars(captured.graph_module).values() if isinstance(value, torch.Tensor)]
    assert [value.device.type for value in literals] == ["meta"]


def test_activations_that_are_no_numbers_are_named(network, images):
    capture_(network, (images,))
    with pytest.raises(ValueError, match="must be numbers to be quantized, got NaN at 'images'"):
        network.train()(images * float("nan"))


def test_misuse_is_refused(network, images):
    with pytest.raises(ValueError, match="must be a tuple of tensors with a batch dimension"):
        capture_(network, ())
    with pytest.raises(ValueError, match="got a Tensor: not a tuple"):
        capture_(network, images)
    with pytest.raises(ValueError, match="must have a convolution"):
        capture_(nn.Sequential(nn.ReLU()), (images,))
    with pytest.raises(ValueError, match="must be captured, got a plain Net"):
        release_(network)
    with pytest.raises(ValueError, match="must be captured, got a plain Net"):
        convert(network)
    captured = capture_(network, (images,))
    with pytest.raises(ValueError, match=r"quantized already: lightning_edge\.release_\(network\)"):
        capture_(network, (images,))
    with pytest.raises(ValueError, match=r"before they are converted, got none at \['images'"):
        convert(network)
    with pytest.raises(ValueError, match="before they are frozen"):
        captured.freeze_observers()


def test_a_network_captured_and_filled_in_inference_mode_can_be_trained(trained, images):
    _, captured = trained
    other = Net()
    with torch.inference_mode():
        twin = capture_(other, (images + 0,))
        other.eval()(images)
        twin.load_observer_state(captured.observer_state())
        assert other(images).is_inference()
    other.train()(images).sum().backward()
    assert not torch.equal(twin.observer_state()["linear.max_val"], captured.observer_state()["linear.max_val"])


def test_a_released_network_computes_in_float_again(network, images):
    network.eval()
    expected = network(images)
    capture_(network, (images,))
    assert not torch.equal(network(images), expected)
    release_(network)
    assert torch.equal(network(images), expected)


def test_the_plain_graph_has_no_batch_norm_and_the_networks_own_weights(network, images):
    graph = deployed(network, (images,))
    network.eval()
    torch.testing.assert_close(graph(images), network(images), rtol=1e-4, atol=1e-5)
    assert graph.conv1.weight is network.conv1.weight
    assert not graph.graph.find_nodes(op="call_function", target=ATEN.batch_norm.default)


def test_a_pointwise_convolution_whose_arguments_are_all_defaults_is_converted(images):
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 10))
    captured = capture_(small, (images,))
    small(images)
    small.eval()
    torch.testing.assert_close(captured.convert()(images), small(images), atol=0.1, rtol=0.1)
