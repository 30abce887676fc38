import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_edge.surgery.selection import find_network, network_path, select_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 2)})


def test_the_default_is_every_linear_and_convolution_weight_and_nothing_else():
    assert list(select_weights(Net())) == ["conv1.weight", "head.fc1.weight", "head.fc2.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["conv*"], [], ["conv1.weight"]),
        (["Linear"], [], ["head.fc1.weight", "head.fc2.weight"]),
        (["*"], ["head.fc2", "Conv2d"], ["head.fc1.weight"]),
    ],
)
def test_patterns_match_names_and_classes(include, exclude, names):
    assert list(select_weights(Net(), include=include, exclude=exclude)) == names


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(argument):
    with pytest.raises(ValueError, match=rf"{argument} must match a linear or convolution layer, got 'conv2'.*'conv1'"):
        select_weights(Net(), **{argument: ["conv2"]})


def test_a_string_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"write \['fc\*'\]"):
        select_weights(Net(), include="fc*")


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match="must leave a layer"):
        select_weights(Net(), exclude=["*"])


def test_a_shared_weight_is_listed_once():
    net = Net()
    net.head["fc2"] = nn.Linear(4, 4)
    net.head["fc2"].weight = net.head["fc1"].weight
    assert list(select_weights(net)) == ["conv1.weight", "head.fc1.weight"]


def test_frozen_and_unbuilt_layers_get_a_clear_answer():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="must be trainable.*unfreeze it or add it to exclude"):
        select_weights(nn.Sequential(frozen))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="must be built before"):
        select_weights(lazy)


def test_the_network_is_the_only_child_with_parameters():
    module = nn.Module()
    module.net, module.loss = Net(), nn.CrossEntropyLoss()
    assert network_path(module) == "net"
    module.other = nn.Linear(1, 1)
    assert find_network(module) is module
    assert find_network(module, "net.head") is module.net.head


def test_a_module_with_parameters_of_its_own_is_the_network():
    module = nn.Module()
    module.net, module.scale = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    assert find_network(module) is module


def test_an_unknown_path_names_the_nearest():
    module = nn.Module()
    module.model = Net()
    with pytest.raises(ValueError, match=r"got 'modle'; near: \['model'"):
        find_network(module, "modle")


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
    ids=["prune", "weight_norm", "spectral_norm", "old spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_a_weight_that_is_computed_is_refused_with_the_mend(change):
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    change(network[0])
    with pytest.raises(ValueError, match=r"layer '0' must hold its weight as a parameter, .*take that off first"):
        select_weights(network)
    assert list(select_weights(network, exclude=["0"])) == ["2.weight"]
