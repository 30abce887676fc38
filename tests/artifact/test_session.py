import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_edge import load_artifact, pack, unpack
from lightning_edge.artifact import EdgeFormatError, inspect

RNG = np.random.default_rng(0)


def build(nodes, tensors, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(*item) for item in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def convolutional():
    """A pruned, shared convolution, a linear layer, two outputs, a free batch size."""
    codebook = RNG.normal(size=5).astype(np.float32)
    filters = codebook[RNG.integers(0, 5, (6, 1, 3, 3))] * (RNG.random((6, 1, 3, 3)) < 0.5)
    nodes = [
        helper.make_node("Conv", ["image", "filters", "offset"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["live"]),
        helper.make_node("Flatten", ["live"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"]),
    ]
    tensors = {
        "filters": filters.astype(np.float32),
        "offset": RNG.normal(size=6).astype(np.float32),
        "weight": RNG.normal(size=(96, 10)).astype(np.float32),
        "bias": np.zeros(10, np.float32),
    }
    inputs = [("image", TensorProto.FLOAT, ["batch", 1, 4, 4])]
    outputs = [("logits", TensorProto.FLOAT, ["batch", 10]), ("features", TensorProto.FLOAT, ["batch", 96])]
    return build(nodes, tensors, inputs, outputs), [RNG.normal(size=(3, 1, 4, 4)).astype(np.float32)]


def branching():
    """An If whose branches use a value and a tensor of the graph around them, and a tensor of their own."""
    branches = {}
    for name, tensor in (("then_branch", "outer"), ("else_branch", "inner")):
        own = [numpy_helper.from_array(RNG.normal(size=(4, 4)).astype(np.float32), "inner")]
        out = helper.make_tensor_value_info(f"{name} out", TensorProto.FLOAT, [2, 4])
        node = helper.make_node("MatMul", ["hidden value", tensor], [f"{name} out"])
        branches[name] = helper.make_graph([node], name, [], [out], own if tensor == "inner" else [])
    nodes = [
        helper.make_node("Relu", ["x"], ["hidden value"]),
        helper.make_node("If", ["choice"], ["y"], **branches),
    ]
    inputs = [("x", TensorProto.FLOAT, [2, 4]), ("choice", TensorProto.BOOL, [])]
    model = build(
        nodes, {"outer": RNG.normal(size=(4, 4)).astype(np.float32)}, inputs, [("y", TensorProto.FLOAT, [2, 4])]
    )
    return model, [RNG.normal(size=(2, 4)).astype(np.float32), np.array(True)]


def quantized():
    """int8 weights with a scale and a zero point per channel, uint8 activations: the QDQ form."""
    tensors = {
        "codes": RNG.integers(-127, 128, (8, 16)).astype(np.int8),
        "scales": RNG.random(8).astype(np.float32),
        "zeros": np.zeros(8, np.int8),
        "x scale": np.array(0.02, np.float32),
        "x zero": np.array(128, np.uint8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x scale", "x zero"], ["quantized"]),
        helper.make_node("DequantizeLinear", ["quantized", "x scale", "x zero"], ["x again"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["weight"], axis=0),
        helper.make_node("Gemm", ["x again", "weight"], ["y"], transB=1),
    ]
    model = build(nodes, tensors, [("x", TensorProto.FLOAT, [2, 16])], [("y", TensorProto.FLOAT, [2, 8])])
    return model, [RNG.normal(size=(2, 16)).astype(np.float32)]


def run(model, arrays):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {item.name: array for item, array in zip(session.get_inputs(), arrays, strict=True)})


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("make", [convolutional, branching, quantized])
def test_a_packed_network_gives_exactly_the_outputs_of_the_original(make, tmp_path):
    model, arrays = make()
    expected = run(model.SerializeToString(), arrays)
    pack(model, tmp_path / "net.edge")
    unpack(tmp_path / "net.edge", tmp_path / "net.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"), full_check=True)
    for name in ("net.edge", "net.onnx"):
        outputs = as_tuple(load_artifact(tmp_path / name)(*arrays))
        assert [output.tobytes() for output in outputs] == [output.tobytes() for output in expected]


def test_both_branches_of_a_packed_network_run(tmp_path):
    model, (x, _) = branching()
    session = load_artifact(pack(model, tmp_path / "net.edge").path)
    for choice in (True, False):
        expected = run(model.SerializeToString(), [x, np.array(choice)])[0]
        assert np.array_equal(session(x, np.array(choice)), expected)


def test_a_model_with_tensors_in_a_second_file_is_packed_by_its_path(tmp_path):
    model, arrays = convolutional()
    expected = run(model.SerializeToString(), arrays)
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "net.onnx"
    onnx.save(model, source, save_as_external_data=True, location="net.data", size_threshold=0)
    assert (tmp_path / "source" / "net.data").stat().st_size > 3000
    outputs = load_artifact(source)(*arrays)
    assert np.array_equal(outputs[0], expected[0])
    path = pack(str(source), tmp_path / "net.edge").path
    for file in (tmp_path / "source").iterdir():
        file.unlink()
    assert {row.name for row in inspect(path).tensors} == {"filters", "offset", "weight", "bias"}
    assert np.array_equal(load_artifact(path)(*arrays)[0], expected[0])


def test_a_session_says_what_it_is(tmp_path):
    path = pack(convolutional()[0], tmp_path / "net.edge").path
    session = load_artifact(str(path), threads=2)
    assert (session.path, session.threads) == (path, 2)
    assert session.runtime == f"onnxruntime {onnxruntime.__version__}"
    (item,) = session.inputs
    assert (item.name, item.shape, item.dtype) == ("image", (None, 1, 4, 4), "float32")


def test_inputs_of_any_layout_and_a_single_output_are_taken(tmp_path):
    model, (x,) = quantized()
    session = load_artifact(pack(model, tmp_path / "net.edge").path)
    assert isinstance(session(x), np.ndarray)
    assert np.array_equal(session(np.asfortranarray(x)), session(x))


def test_arrays_may_be_given_by_name(tmp_path):
    model, (x, choice) = branching()
    session = load_artifact(pack(model, tmp_path / "net.edge").path)
    assert session.outputs == ("y",)
    expected = session(x, choice)
    assert np.array_equal(session(choice=choice, x=x), expected)
    assert np.array_equal(session(x, choice=choice), expected)
    with pytest.raises(ValueError, match=r"must get 2 arrays, \['x', 'choice'\], got 1 and \['x'\]"):
        session(choice, x=x)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], r"net.edge must get 1 arrays, \['image'\], got 0"),
        ([np.zeros((1, 1, 4, 4), np.float32)] * 2, r"net.edge must get 1 arrays, \['image'\], got 2"),
        (
            [np.zeros((1, 1, 4, 4))],
            r"input 'image' of net.edge must be float32 of shape \('any', 1, 4, 4\), got float64 of",
        ),
        ([np.zeros((1, 1, 4, 5), np.float32)], r"got float32 of \(1, 1, 4, 5\)"),
        ([np.zeros((1, 4, 4), np.float32)], r"got float32 of \(1, 4, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    session = load_artifact(pack(convolutional()[0], tmp_path / "net.edge").path)
    with pytest.raises(ValueError, match=message):
        session(*arrays)


def test_what_cannot_be_loaded_is_named(tmp_path):
    path = pack(convolutional()[0], tmp_path / "net.edge").path
    with pytest.raises(ValueError, match="threads must be a whole number, at least 1, got 0"):
        load_artifact(path, threads=0)
    with pytest.raises(ValueError, match=r"path must end in one of \['.edge', '.onnx', '.pte'\], got 'net.ckpt'"):
        load_artifact(tmp_path / "net.ckpt")
    with pytest.raises(FileNotFoundError, match="path must be a file, got 'no.edge'"):
        load_artifact("no.edge")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(ValueError, match=r"onnxruntime must be able to load .*text.onnx, got: "):
        load_artifact(tmp_path / "text.onnx")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EdgeFormatError):
        load_artifact(path)
    with pytest.raises(EdgeFormatError, match="the file must hold a graph to be run, got tensors alone"):
        load_artifact(pack({"w": np.zeros(9)}, tmp_path / "w.edge").path)


def test_a_device_without_torch_and_onnx_runs_a_file_and_inspects_it(tmp_path):
    model, (x,) = quantized()
    expected = run(model.SerializeToString(), [x])[0]
    pack(model, tmp_path / "net.edge")
    np.save(tmp_path / "x.npy", x)
    program = """
        import sys
        absent = ["torch", "lightning", "onnx", "onnxscript", "torchao", "torchmetrics", "hydra", "omegaconf",
                  "sklearn", "matplotlib", "jinja2", "rich", "executorch"]
        for name in absent:
            sys.modules[name] = None
        import numpy as np
        from lightning_edge import load_artifact, unpack
        from lightning_edge.artifact import inspect, read_tensors
        np.save("y.npy", load_artifact("net.edge")(np.load("x.npy")))
        unpack("net.edge", "back.onnx")
        unpack("net.edge", "back.safetensors")
        assert len(inspect("net.edge").tensors) == len(read_tensors("net.edge")) == 2
        assert not any(sys.modules.get(name) for name in absent)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.mark.parametrize("suffix", ["onnx", "edge"])
def test_openvino_runs_the_files_of_onnxruntime(tmp_path, suffix):
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    model, arrays = convolutional()
    pack(model, tmp_path / "net.edge")
    onnx.save(model, tmp_path / "net.onnx")
    session = load_artifact(tmp_path / f"net.{suffix}", runtime="openvino", threads=1)
    assert session.runtime.startswith("OpenVINO 20")
    (item,) = session.inputs
    assert (item.name, item.shape, item.dtype, session.outputs) == (
        "image",
        (None, 1, 4, 4),
        "float32",
        ("logits", "features"),
    )
    expected = run(model.SerializeToString(), arrays)
    for array in arrays:
        array.flags.writeable = False
    first = session(*arrays)
    session(*(array + 1 for array in arrays))  # what was returned before stays
    for rows in range(1, 8):  # more sizes than it compiles for
        few = [np.repeat(array[:1], rows, axis=0) for array in arrays]
        for found, wanted in zip(session(*few), run(model.SerializeToString(), few), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(first, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:  # calls from several threads do not see each other's numbers
        inputs = [[array * factor for array in arrays] for factor in range(1, 9)]
        together = list(pool.map(lambda few: session(*few), inputs * 20))
    alone = [session(*few) for few in inputs] * 20
    assert all(np.array_equal(a, b) for pair in zip(together, alone, strict=True) for a, b in zip(*pair, strict=True))


def test_a_missing_openvino_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    path = pack(convolutional()[0], tmp_path / "net.edge").path
    with pytest.raises(ImportError, match=r"pip install 'lightning-edge\[openvino\]'"):
        load_artifact(path, runtime="openvino")
    with pytest.raises(ValueError, match=r"runtime must be one of \[None, 'openvino'\], got 'tflite'"):
        load_artifact(path, runtime="tflite")
