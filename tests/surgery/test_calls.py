import pytest
import torch
from torch import nn

from lightning_edge import export, load_artifact, quantize
from lightning_edge.surgery.calls import Arguments, arguments_of, as_arguments, call_during, joined
from lightning_edge.surgery.quantization import capture_


class Many(nn.Module):
    """Optional and nested inputs, a flag and a mask by name alone; a dict of outputs, one of them nested."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, more=None, *, mask=None, flag=True):
        y = self.fc(x)
        if more is not None:
            y = y + self.fc(more["b"][0])
        if mask is not None:
            y = y * mask
        return {"y": y, "z": {"a": y + 1, "nothing": None}} if flag else y


X, MASK = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.5, 1.0]] * 4)
CALLS = {
    "one": {"x": X},
    "nested": {"x": X, "more": {"a": MASK, "b": [X]}, "mask": MASK},
    "flag": {"x": X, "mask": MASK, "flag": False},
}


def test_one_form_whichever_way_the_inputs_are_given():
    network = Many()
    more = {"b": [X]}
    for args, named in (((X, more), {}), ((X,), {"more": more}), ((), {"more": more, "x": X})):
        found = arguments_of(network, args, named)
        assert (found[0] is X, found[1] is more, dict(found.named)) == (True, True, {})
    assert len(arguments_of(network, (X, None), {})) == 1
    assert arguments_of(network, (X,), {"mask": MASK}).named.keys() == {"mask"}


def test_rows_are_those_of_the_first_tensor_and_only_the_batch_is_cut():
    inputs = Arguments.of((torch.tensor(3.0), X, MASK[:1]), {"flag": True})
    assert (inputs.rows, len(inputs.tensors)) == (4, 3)
    assert [tuple(value.shape) for value in inputs.first(2).tensors] == [(), (2, 3), (1, 2)]
    assert [tuple(value.shape) for value in joined([inputs, inputs]).tensors] == [(), (8, 3), (1, 2)]
    assert inputs.first(2).named == {"flag": True}


@pytest.mark.parametrize("inputs", [X, (), (3,), (torch.tensor(1.0),), {}])
def test_inputs_without_a_batch_are_refused(inputs):
    with pytest.raises(ValueError, match="example_inputs must be a tuple of tensors with a batch dimension, or a dict"):
        as_arguments(nn.Linear(3, 2), inputs)


def test_inputs_that_the_network_does_not_take_are_refused():
    with pytest.raises(
        ValueError, match="example_inputs must be what Many takes, got: missing a required argument: 'x'"
    ):
        as_arguments(Many(), {"image": X})


def test_a_call_is_cut_off_and_the_hook_is_gone():
    network, done = Many(), []

    def run():
        network(X, mask=MASK)
        done.append(1)

    assert call_during(network, run).named["mask"] is MASK
    assert done == []
    assert call_during(network, lambda: None) is None
    run()
    assert done == [1]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("suffix", ["onnx", "pte", "edge"])
@pytest.mark.parametrize("scheme", [None, "int8_static"])
def test_files_take_the_tensors_one_by_one_under_their_names(call, suffix, scheme, tmp_path):
    if suffix == "pte":
        pytest.importorskip("executorch")
    torch.manual_seed(0)
    network = Many().eval() if scheme is None else quantize(Many(), [CALLS[call]], scheme=scheme)
    path = export(network, tmp_path / f"model.{suffix}", example_inputs=CALLS[call])
    session = load_artifact(path)
    tensors = as_arguments(network, CALLS[call]).tensors
    names = {"one": ["x"], "nested": ["x", "more_a", "more_b_0", "mask"], "flag": ["x", "mask"]}[call]
    assert [item.name for item in session.inputs] == names
    found = session(**{name: value.numpy() for name, value in zip(names, tensors, strict=True)})
    with torch.no_grad():
        expected = network(**CALLS[call])
    if call == "flag":
        expected, found = {"y": expected, "z": {"a": expected + 1}}, (found, found + 1)
    else:
        assert session.outputs == ("y", "z.a")
    for value, array in zip((expected["y"], expected["z"]["a"]), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(array), value, rtol=1e-3, atol=0.02)


def test_a_captured_network_takes_its_inputs_by_name_and_by_position():
    network = Many().eval()
    capture_(network, CALLS["nested"])
    outputs = [network(**CALLS["nested"]), network(X, CALLS["nested"]["more"], mask=MASK)]
    assert torch.equal(outputs[0]["z"]["a"], outputs[1]["z"]["a"])


def test_batches_of_a_calibration_lose_no_input():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x, mask=None):
            return self.fc(x) if mask is None else self.fc(x) * mask

    labels = torch.zeros(4, dtype=torch.long)
    ranges = []
    for batch in ({"x": X, "mask": 3 * MASK, "label": labels}, ((X, 3 * MASK), labels), [(X, 3 * MASK), labels]):
        quantized = quantize(Masked(), [batch])
        ranges.append("mul" in quantized.forward.observers)
        assert quantized(X, MASK).shape == (4, 2)
    assert all(ranges)
    with pytest.raises(ValueError, match=r"must say what \['mask'\] are, got a tuple of 2 for Masked.* a dict by name"):
        quantize(Masked(), [(X, 3 * MASK)])
