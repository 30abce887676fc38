import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lightning_edge import export, load_artifact, share_weights_
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.export.onnx import to_onnx

SEQUENCES = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 16))


def test_weights_of_layers_on_sequences_have_the_names_and_bits_of_the_module():
    module = network()
    model = to_onnx(module, (SEQUENCES,))
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert {name: value.tobytes() for name, value in stored.items()} == {
        name: value.detach().numpy().tobytes() for name, value in module.named_parameters()
    }


def test_a_transformer_keeps_its_names_and_its_outputs(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    path = export(layer, tmp_path / "net.edge", example_inputs=(SEQUENCES,), round_small=False)
    matrices = {name for name, value in layer.named_parameters() if value.dim() == 2}
    assert matrices <= set(read_tensors(path))
    expected = layer(SEQUENCES).detach().numpy()
    np.testing.assert_allclose(load_artifact(path)(SEQUENCES.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_the_runtime_folds_the_transposes(tmp_path):
    path = export(network(), tmp_path / "net.onnx", example_inputs=(SEQUENCES,))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert b"Transpose" in path.read_bytes()
    assert b"Transpose" not in (tmp_path / "folded.onnx").read_bytes()


@pytest.mark.parametrize("options", [{"channel_scale": True}, {"block": 2}], ids=str)
def test_shared_weights_are_as_small_on_sequences_as_on_rows(options, tmp_path):
    module = network()
    share_weights_(module, clusters=12, **options)
    sizes = []
    for name, example in (("rows", SEQUENCES[:, 0]), ("sequences", SEQUENCES)):
        path = export(module, tmp_path / f"{name}.edge", example_inputs=(example,))
        np.testing.assert_allclose(
            load_artifact(path)(example.numpy()), module(example).detach().numpy(), rtol=1e-2, atol=1e-2
        )
        sizes.append({row.name: (row.codec, row.size_bytes) for row in inspect(path).tensors if len(row.shape) == 2})
    assert len(sizes[0]) == 3
    assert sizes[0] == sizes[1]


def test_two_layers_of_equal_weights_both_get_a_name():
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    module[2].load_state_dict(module[0].state_dict())
    stored = {item.name for item in to_onnx(module, (SEQUENCES,)).graph.initializer}
    assert stored == {"0.weight", "2.weight"}
