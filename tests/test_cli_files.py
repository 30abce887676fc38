"""The commands on files, run on real ones."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_edge import pack, unpack
from lightning_edge.artifact import read_tensors
from lightning_edge.cli import main

RNG = np.random.default_rng(0)


def model(inputs, *, outputs=1, seed=0):
    """y = sum of the inputs as floats, times a weight; a second output is its ReLU."""
    weight = np.random.default_rng(seed).integers(-1, 2, (4, 8)).astype(np.float32) / 3
    nodes = [helper.make_node("Cast", [name], [f"{name} float"], to=TensorProto.FLOAT) for name, _, _ in inputs]
    nodes.append(helper.make_node("Sum", [f"{name} float" for name, _, _ in inputs], ["total"]))
    nodes.append(helper.make_node("MatMul", ["total", "weight"], ["y"]))
    if outputs == 2:
        nodes.append(helper.make_node("Relu", ["y"], ["live"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 8]) for name in ("y", "live")[:outputs]],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


FLOATS = [("x", TensorProto.FLOAT, ["batch", 4])]


@pytest.fixture(params=["net.edge", "net.onnx"])
def network(request, tmp_path):
    """A network as each kind of file."""
    path = tmp_path / request.param
    pack(model(FLOATS), tmp_path / "net.edge")
    unpack(tmp_path / "net.edge", tmp_path / "net.onnx")
    return path


def refused(capsys, *arguments):
    """The one message of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", ["unpack", "inspect", "run"])
def test_files_that_expand_to_more_than_said_are_refused(capsys, tmp_path, command):
    pack(model(FLOATS), tmp_path / "net.edge")
    out = [tmp_path / "out.onnx"] if command == "unpack" else []
    assert "must" in refused(capsys, command, tmp_path / "net.edge", *out, "--max-bytes", 200)


def test_pack_says_what_it_made_of_what(capsys, tmp_path):
    onnx.save(model(FLOATS), "net.onnx")
    before, name = (tmp_path / "net.onnx").stat().st_size, "net.edge"
    assert main(["pack", "net.onnx", name]) == 0
    after = (tmp_path / name).stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        f"source: net.onnx, {before:,} bytes",
        f"file: net.edge, {after:,} bytes, {before / after:.2f} times smaller",
        "tensors: 1: 1 dense",
    ]


def test_pack_counts_the_tensors_that_lie_beside_a_model(capsys, tmp_path):
    onnx.save(model(FLOATS), "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert main(["pack", "net.onnx", "net.edge"]) == 0
    size = sum((tmp_path / name).stat().st_size for name in ("net.onnx", "net.data"))
    assert capsys.readouterr().out.startswith(f"source: net.onnx, {size:,} bytes\n")


def test_pack_leaves_adaptive_contexts_out_when_told_so(capsys, tmp_path):
    torch = pytest.importorskip("torch")
    rough = RNG.normal(size=(50, 64)) * np.arange(1, 51)[:, None]
    torch.save({"w": torch.from_numpy(np.floor(rough / 5).astype(np.float32))}, "net.pt")
    assert main(["pack", "net.pt", "small.edge"]) == main(["pack", "net.pt", "fast.edge", "--no-adaptive"]) == 0
    assert re.findall(r"tensors: 1: 1 (\w+)", capsys.readouterr().out)[0] == "context"
    assert (tmp_path / "small.edge").stat().st_size < (tmp_path / "fast.edge").stat().st_size
    assert np.array_equal(read_tensors("small.edge")["w"], read_tensors("fast.edge")["w"])


def test_unpack_writes_an_ordinary_file_and_says_so(capsys, tmp_path):
    pack(model(FLOATS), "net.edge")
    assert main(["unpack", "net.edge", "back.onnx"]) == 0
    assert capsys.readouterr().out == f"file: back.onnx, {(tmp_path / 'back.onnx').stat().st_size:,} bytes\n"
    onnx.checker.check_model("back.onnx")


def test_inspect_prints_tensors_and_where_the_bytes_go(capsys, tmp_path):
    size = pack(model(FLOATS), "net.edge").size_bytes
    assert main(["inspect", "net.edge"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = (row for row in rows if row[:1] == ["weight"])
    assert row[1:7] == ["4", "x", "8", "float32", "3", row[6]]
    assert row[7:9] == ["dense", "huffman"]
    assert [row[0] for row in rows[-5:] if row] == ["container", "graph", "tensors", "file"]
    assert f"{size:,}" in next(row for row in rows if row[:1] == ["file"])


def test_run_makes_inputs_up_and_says_so(capsys, network):
    assert main(["run", str(network), "--repeat", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"file: {network}, {network.stat().st_size:,} bytes, onnxruntime ")
    assert lines[0].endswith(", threads 1")
    assert lines[1:3] == ["input x: float32 1 x 4, random numbers", "output 0: float32 1 x 8"]
    assert re.fullmatch(r"latency: median \d+\.\d{3} ms, 95th percentile \d+\.\d{3} ms, 3 calls", lines[3])


def test_run_takes_arrays_and_writes_what_comes_out(capsys, network):
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    np.save("x.npy", x)
    assert main(["run", str(network), "x.npy", "--out", "y.npy", "--threads", "2", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "input x: float32 5 x 4, x.npy\noutput 0: float32 5 x 8, written to y.npy\n" in out
    assert "threads 2" in out
    weight = numpy_helper.to_array(model(FLOATS).graph.initializer[0])
    np.testing.assert_allclose(np.load("y.npy"), x @ weight, rtol=1e-5, atol=1e-6)


def test_run_writes_several_outputs_into_one_file(capsys):
    pack(model(FLOATS, outputs=2), "net.edge")
    assert main(["run", "net.edge", "--out", "y.npz", "--repeat", "1"]) == 0
    assert "output 1: float32 1 x 8, written to y.npz" in capsys.readouterr().out
    with np.load("y.npz") as found:
        assert sorted(found) == ["output0", "output1"]
        assert np.array_equal(np.maximum(found["output0"], 0), found["output1"])
    assert "out must end in .npz for 2 outputs, got 'y.npy'" in refused(capsys, "run", "net.edge", "--out", "y.npy")


@pytest.mark.parametrize(
    ("kind", "dtype", "low", "high"),
    [
        (TensorProto.FLOAT16, np.float16, None, None),
        (TensorProto.DOUBLE, np.float64, None, None),
        (TensorProto.INT8, np.int8, -128, 127),
        (TensorProto.UINT8, np.uint8, 0, 255),
        (TensorProto.INT64, np.int64, 0, 1),
        (TensorProto.BOOL, np.bool_, 0, 1),
    ],
)
def test_random_inputs_have_the_type_and_the_shape_that_is_asked_for(capsys, kind, dtype, low, high):
    pack(model([("x", kind, [200, 4])]), "net.edge")
    weight = np.linalg.pinv(numpy_helper.to_array(model(FLOATS).graph.initializer[0]))
    assert main(["run", "net.edge", "--out", "y.npy", "--repeat", "1"]) == 0
    assert f"input x: {np.dtype(dtype)} 200 x 4, random numbers" in capsys.readouterr().out
    inputs = np.load("y.npy") @ weight  # what went in
    if low is None:
        low, high = inputs.min(), inputs.max()
    assert len(np.unique(inputs.round(2))) > 1
    np.testing.assert_allclose([inputs.min(), inputs.max()], [low, high], atol=0.06 * (high - low))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.npy"], "inputs must be .npy files, got 'no.npy', which cannot be read"),
        (["text.npy"], "inputs must be .npy files, got 'text.npy', which cannot be read"),
        (["empty.npy"], "inputs must be .npy files, got 'empty.npy', which cannot be read"),
        (["objects.npy"], "inputs must be .npy files, got 'objects.npy', which cannot be read"),
        (["two.npz"], "inputs must be .npy files of one array each, got 'two.npz', which holds several"),
        (["wide.npy"], "input 'x' of net.edge must be float32 of shape ('any', 4), got float32 of (2, 5)"),
        (["double.npy"], "input 'x' of net.edge must be float32 of shape ('any', 4), got float64 of (2, 4)"),
        (["wide.npy", "wide.npy"], "net.edge must get 1 arrays, ['x'], got 2"),
        (["--out", "y.txt"], "out must end in .npy or .npz, got 'y.txt'"),
        (["--repeat", "0"], "repeat must be at least 1, got 0"),
        (["--threads", "0"], "threads must be a whole number, at least 1, got 0"),
    ],
)
def test_run_names_what_does_not_fit(capsys, tmp_path, arguments, message):
    pack(model(FLOATS), "net.edge")
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    np.savez("two.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("wide.npy", np.zeros((2, 5), np.float32))
    np.save("double.npy", np.zeros((2, 4)))
    assert message in refused(capsys, "run", "net.edge", *arguments)
    assert not (tmp_path / "y.txt").exists()


def test_run_names_what_the_runtime_refuses(capsys):
    pack(model([("a", TensorProto.FLOAT, ["n", 4]), ("b", TensorProto.FLOAT, ["m", 4])]), "net.edge")
    np.save("a.npy", np.zeros((2, 4), np.float32))
    np.save("b.npy", np.zeros((3, 4), np.float32))
    assert "must be able to run net.edge on these arrays, got: " in refused(capsys, "run", "net.edge", "a.npy", "b.npy")


def test_inputs_that_cannot_be_made_up_have_to_be_given(capsys):
    pack(model([("x", TensorProto.BFLOAT16, [1, 4])]), "net.edge")
    said = refused(capsys, "run", "net.edge")
    assert "inputs must be given for 'x': there are no random numbers of type bfloat16" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "net.ckpt"], "path must end in one of ['.edge', '.onnx', '.pte'], got 'net.ckpt'"),
        (["run", "no.edge"], "path must be a file, got 'no.edge', which does not exist"),
        (["inspect", "no.edge"], "path must be a file, got 'no.edge', which does not exist"),
        (["unpack", "no.edge", "net.onnx"], "path must be a file, got 'no.edge', which does not exist"),
        (["pack", "no.onnx", "net.edge"], "source must be a file, got 'no.onnx', which does not exist"),
        (["inspect", "text.edge"], "a .edge file must start with b'EDGE', got b'text'"),
        (["run", "text.edge"], "a .edge file must start with b'EDGE', got b'text'"),
        (["run", "tensors.edge"], "the file must hold a graph to be run, got tensors alone"),
        (["unpack", "tensors.edge", "net.pt"], "out must end in one of ['.onnx', '.safetensors'], got 'net.pt'"),
        (["pack", "text.edge", "net.edge"], "source must end in one of .onnx, .safetensors, .pt"),
    ],
    ids=" ".join,
)
def test_files_that_do_not_fit_are_one_message(capsys, tmp_path, arguments, message):
    (tmp_path / "text.edge").write_text("text, not a packed file")
    pack({"w": np.zeros(9)}, "tensors.edge")
    assert message in refused(capsys, *arguments)
