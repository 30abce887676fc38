import json
import struct

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import lightning_edge
from lightning_edge import load_artifact, pack, unpack
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.artifact.reading import SAFETENSORS, onnx_bytes, open_file
from lightning_edge.artifact.tensors import BFLOAT16

OPSET = [helper.make_opsetid("", 20)]


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, tensors, *, inputs=(("x", [2, 4]),), outputs=(("y", [2, 3]),)):
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(
        nodes, "net", [value(*item) for item in inputs], [value(*item) for item in outputs], initializers
    )
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10, producer_name="someone's machine")


def two_layers():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight"], ["/first/a very long name"], name="one", doc_string="line 7"),
        helper.make_node("Relu", ["/first/a very long name"], ["/relu/another long name"], name="two"),
        helper.make_node("Gemm", ["/relu/another long name", "second.weight", "bias"], ["y"], name="three"),
    ]
    tensors = {
        "first.weight": rng.normal(size=(4, 30)).astype(np.float32),
        "second.weight": rng.integers(-2, 3, (30, 3)).astype(np.float32),
        "bias": np.ones(3, np.float32),
    }
    return model(nodes, tensors), tensors


def test_a_report_states_the_bytes_that_are_in_the_file(tmp_path):
    report = pack(two_layers()[0], tmp_path / "net.edge", recipe_hash="abc")
    assert report.path == tmp_path / "net.edge"
    assert report.size_bytes == report.path.stat().st_size
    assert [row.name for row in report.tensors] == ["first.weight", "second.weight"]
    inspection = inspect(report.path)
    assert [(row.name, row.codec, row.size_bytes) for row in report.tensors] == [
        (row.name, row.codec, row.size_bytes) for row in inspection.tensors
    ]
    assert sum(section.size_bytes for section in inspection.sections) + 37 == report.size_bytes
    assert report.graph_bytes == inspection.graph_bytes
    assert inspection.sections[2].size_bytes == sum(row.size_bytes for row in report.tensors)
    assert (inspection.tool_version, inspection.recipe_hash) == (lightning_edge.__version__, "abc")


def test_the_bytes_depend_on_the_source_alone(tmp_path):
    first = pack(two_layers()[0], tmp_path / "first.edge").path.read_bytes()
    renamed = two_layers()[0]
    renamed.producer_name, renamed.doc_string, renamed.graph.name = "another", "today", "another"
    renamed.metadata_props.add(key="path", value="/home/someone")
    for number, node in enumerate(renamed.graph.node):
        node.name = f"node {number}"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File 'train.py'")
    renamed.graph.value_info.append(value("/first/a very long name", [2, 30]))
    (tmp_path / "sub").mkdir()
    assert pack(renamed, tmp_path / "sub" / "second.edge").path.read_bytes() == first
    assert pack(two_layers()[0], tmp_path / "first.edge", recipe_hash="x").path.read_bytes() != first


def test_the_source_is_left_as_it_was(tmp_path):
    source, _ = two_layers()
    before = source.SerializeToString()
    pack(source, tmp_path / "net.edge")
    assert source.SerializeToString() == before
    tensors = {"w": np.arange(100.0)}
    pack(tensors, tmp_path / "w.edge")
    assert np.array_equal(tensors["w"], np.arange(100.0))


def test_what_describes_the_making_is_not_in_the_file(tmp_path):
    graph = open_file(pack(two_layers()[0], tmp_path / "net.edge").path).graph
    for text in (b"someone", b"very long", b"line 7", b"three"):
        assert text not in graph
    assert b"bias" in graph


def test_a_fresh_short_name_is_none_that_is_taken(tmp_path):
    """Short names start with 0: an input, an output, a used and an unused tensor have it and the next ones already."""
    nodes = [
        helper.make_node("Gemm", ["0", "1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["2"]),
        helper.make_node("Add", ["2", "3"], ["4"]),
    ]
    tensors = {
        "1": np.eye(4, 3, dtype=np.float32),
        "3": np.ones(1, np.float32),
        "5": np.zeros(100, np.float32),
        "6": np.zeros(2, np.float32),
    }
    source = model(nodes, tensors, inputs=[("0", [2, 4])], outputs=[("4", [2, 3])])
    data = onnx_bytes(pack(source, tmp_path / "net.edge").path)
    onnx.checker.check_model(data, full_check=True)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(ReferenceEvaluator(onnx.load_from_string(data)).run(None, {"0": x})[0], x[:, :3] + 1)


def test_names_that_quantization_annotations_use_stay(tmp_path):
    source, _ = two_layers()
    source.graph.quantization_annotation.add(tensor_name="/relu/another long name")
    back = onnx.load_from_string(onnx_bytes(pack(source, tmp_path / "net.edge").path))
    assert back.graph.node[1].output[0] == back.graph.quantization_annotation[0].tensor_name


def test_tensors_with_elements_in_typed_fields_are_packed_bit_by_bit(tmp_path):
    floats = helper.make_tensor("floats", TensorProto.FLOAT, [30], np.arange(30, dtype=np.float32))
    halves = helper.make_tensor("halves", TensorProto.FLOAT16, [30], np.arange(30, dtype=np.float16))
    brains = helper.make_tensor("brains", TensorProto.BFLOAT16, [30], np.arange(30, dtype=np.float32))
    flags = helper.make_tensor("flags", TensorProto.BOOL, [30], np.arange(30) % 2 == 0)
    small = helper.make_tensor("small", TensorProto.FLOAT, [2], [1.5, 2.5])
    text = helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"b"])
    source = model([helper.make_node("Identity", ["x"], ["y"])], {}, outputs=[("y", [2, 4])])
    source.graph.initializer.extend([floats, halves, brains, flags, small, text])
    path = pack(source, tmp_path / "net.edge").path
    assert {name: record.dtype for name, record in open_file(path).records.items()} == {
        "floats": 1,
        "halves": 10,
        "brains": BFLOAT16,
        "flags": 9,
    }
    back = onnx.load_from_string(onnx_bytes(path))
    assert {tensor.name for tensor in back.graph.initializer} == {tensor.name for tensor in source.graph.initializer}
    for before in source.graph.initializer:
        after = next(tensor for tensor in back.graph.initializer if tensor.name == before.name)
        expected = numpy_helper.to_array(before)
        assert numpy_helper.to_array(after).astype(object).tolist() == expected.astype(object).tolist()
        assert after.data_type == before.data_type


def test_a_state_dict_of_torch_tensors_is_packed_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    state = {
        "weight": torch.randn(6, 5).t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "brain": torch.randn(40, 3).to(torch.bfloat16)[::2],
        "half": torch.randn(7).half(),
        "steps": torch.tensor(12345),
        "brain scalar": torch.tensor(-0.0, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "wide": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    path = pack(state, tmp_path / "state.edge").path
    tensors = read_tensors(path)
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        back = torch.from_numpy(tensors[name])
        back = back.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else back
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            back.reshape(-1).view(torch.uint8), tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        )
    assert {row.name: row.dtype for row in inspect(path).tensors}["brain"] == "bfloat16"


def test_elements_in_the_other_byte_order_are_turned(tmp_path):
    path = pack({"w": np.arange(50, dtype=">i4")}, tmp_path / "w.edge").path
    assert np.array_equal(read_tensors(path)["w"], np.arange(50))


def test_an_empty_state_dict_is_a_file(tmp_path):
    assert read_tensors(pack({}, tmp_path / "empty.edge").path) == {}


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_safetensors_file_is_packed_as_its_own_library_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    kinds = ["f4", "u1", "i1", "u2", "i2", "i4", "i8", "?", "f2", "f8", "u4", "u8"]
    tensors = {kind: np.frombuffer(rng.bytes(24), kind).copy() for kind in kinds if kind != "?"}
    tensors |= {"?": np.array([[True], [False]]), "scalar": np.array(2.5), "empty": np.zeros((0, 3), np.float32)}
    safetensors.save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    path = pack(tmp_path / "w.safetensors", tmp_path / "w.edge").path
    reference = safetensors.load_file(tmp_path / "w.safetensors")
    back = read_tensors(path)
    assert back.keys() == reference.keys()
    for name, array in reference.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_a_bfloat16_of_a_safetensors_file_keeps_its_type(tmp_path):
    header = {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = pack(write_safetensors(tmp_path / "w.safetensors", header, b"\x80\x3f\0\x80"), tmp_path / "w.edge").path
    assert open_file(path).records["w"].dtype == SAFETENSORS["BF16"] == BFLOAT16


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "source must be a safetensors file, got .*w.safetensors, which cannot be read"),
        ({"w": {"dtype": "F32"}}, "source must be a safetensors file, got"),
        ({"w": 3}, "source must be a safetensors file, got"),
        ([1, 2], "source must be a safetensors file, got"),
        (b"\xff\xfe", "source must be a safetensors file, got"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, "source must be a safetensors file, got"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}, "source must be a safetensors file, got"),
        ({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, "tensors must have one of the types .*F8"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, header, message):
    write_safetensors(tmp_path / "w.safetensors", header, bytes(4))
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "w.safetensors", tmp_path / "w.edge")
    assert not (tmp_path / "w.edge").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"w": np.array(["a"])}, r"tensors must have one of the types .* or bfloat16, got <U1 in 'w'"),
        ({"w": np.array([1 + 2j])}, r"got complex128 in 'w'"),
        ({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}, r"got torch.float8_e4m3fn in 'w'"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, r"got complex64 in 'w'"),
        ({"a\nb": np.zeros(3)}, r"tensor names must be strings without a line break, and not empty, got \['a\\nb'\]"),
        ({"": np.zeros(3)}, r"tensor names must be strings without a line break, and not empty, got \[''\]"),
        ({3: np.zeros(3)}, r"tensor names must be strings without a line break, and not empty, got \[3\]"),
        ({"w": torch.eye(3).to_sparse()}, r"tensors must be dense, got torch.sparse_coo in 'w': pack its to_dense\(\)"),
        ({"_extra_state": {"a": 1}}, "source must hold tensors alone, got a dict under '_extra_state': leave it out"),
        (17, "source must be a path, an ONNX model or a state dict, got a int"),
    ],
)
def test_what_cannot_be_packed_is_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        pack(source, tmp_path / "w.edge")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_before_any_work(tmp_path):
    message = r"path must lie in a folder that exists, got '.*missing/w.edge': make '.*missing' first"
    with pytest.raises(FileNotFoundError, match=message):
        pack("no.onnx", tmp_path / "missing" / "w.edge")
    path = pack({"w": np.zeros(3)}, tmp_path / "w.edge").path
    with pytest.raises(FileNotFoundError, match=message.replace("edge", "safetensors")):
        unpack(path, tmp_path / "missing" / "w.safetensors")


@pytest.mark.parametrize("name", ["packed.edge", "packed.bin"])
def test_a_packed_file_is_not_packed_again(tmp_path, name):
    (tmp_path / name).write_bytes(pack({"w": np.zeros(3)}, tmp_path / "w.edge").path.read_bytes())
    with pytest.raises(ValueError, match=f"source must not be packed, got '.*{name}', a .edge file: unpack it first"):
        pack(tmp_path / name, tmp_path / "again.edge")


def sum_of(first, second, *, nodes=(), initializers=(), outputs=("y",)):
    """y = x * first + x * second."""
    nodes = [
        *nodes,
        *(helper.make_node("Mul", ["x", name], [f"x {index}"]) for index, name in enumerate((first, second))),
        helper.make_node("Add", ["x 0", "x 1"], ["y"]),
    ]
    made = [value(name, ["batch", 400]) for name in outputs]
    graph = helper.make_graph(nodes, "g", [value("x", ["batch", 400])], made, list(initializers))
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


FACTORS = (np.arange(400) % 7).astype(np.float32)[None]


def test_large_constants_of_a_graph_are_coded_as_tensors(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(FACTORS)),
        helper.make_node("Constant", [], ["small"], value=numpy_helper.from_array(FACTORS[:, :1])),
    ]
    path = pack(sum_of("c", "small", nodes=nodes), tmp_path / "net.edge").path
    assert list(read_tensors(path)) == ["c"]
    x = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    assert np.array_equal(load_artifact(path)(x), x * FACTORS + x * FACTORS[:, :1])


def test_equal_tensors_of_a_graph_are_stored_once(tmp_path):
    equal = [numpy_helper.from_array(FACTORS, name) for name in ("a", "b")]
    path = pack(sum_of("a", "b", initializers=equal), tmp_path / "net.edge").path
    assert list(read_tensors(path)) == ["a"]
    assert np.array_equal(load_artifact(path)(np.ones((1, 400), np.float32)), 2 * FACTORS)
    both = sum_of("a", "b", initializers=equal, outputs=("y", "b"))
    assert list(read_tensors(pack(both, tmp_path / "net.edge").path)) == ["a", "b"]


def test_a_source_of_another_suffix_is_refused_with_those_that_are_read(tmp_path):
    (tmp_path / "last.tflite").write_bytes(b"")
    with pytest.raises(ValueError, match=r"source must end in one of .onnx, .safetensors, .pt, .*, got 'last.tflite'"):
        pack(tmp_path / "last.tflite", tmp_path / "w.edge")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".bin"])
def test_a_state_dict_that_torch_saved_is_packed_by_its_path(tmp_path, suffix):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)
    state = network.state_dict()
    torch.save(state if suffix != ".ckpt" else {"epoch": 3, "state_dict": state}, tmp_path / f"net{suffix}")
    path = pack(tmp_path / f"net{suffix}", tmp_path / "net.edge").path
    assert path.read_bytes() == pack(state, tmp_path / "same.edge").path.read_bytes()
    assert list(read_tensors(path)) == list(state)


class Unknown:
    """What weights_only does not load."""


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            Unknown(),
            "source must be a file that torch loads with weights_only=True, got .*cannot be read: Weights only",
        ),
        ([torch.zeros(2)], "source must hold a state dict, itself or under 'state_dict', got a list"),
        ({"state_dict": 3}, "source must hold a state dict, itself or under 'state_dict', got a int"),
        ({"w": torch.zeros(2), "epoch": 3}, r"source must hold tensors by name, .* got others under \['epoch'\] in"),
        ({"state": {0: torch.zeros(2)}}, r"got others under \['state'\] in .*net.pt"),
        ({0: torch.zeros(2)}, r"got others under \[0\] in .*net.pt"),
    ],
)
def test_a_file_of_torch_that_holds_no_state_dict_is_refused(tmp_path, saved, message):
    torch.save(saved, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "net.pt", tmp_path / "w.edge")
    assert not (tmp_path / "w.edge").exists()


def test_a_file_that_torch_did_not_save_is_refused(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match="source must be a file that torch loads with weights_only=True, got .*net.pt"):
        pack(tmp_path / "net.pt", tmp_path / "w.edge")


def test_without_adaptive_contexts_no_tensor_has_them(tmp_path):
    rough = np.random.default_rng(0).normal(size=(50, 64)) * np.arange(1, 51)[:, None]
    tensors = {"w": np.floor(rough / 5).astype(np.float32)}
    smaller = pack(tensors, tmp_path / "w.edge")
    larger = pack(tensors, tmp_path / "w.edge", adaptive=False)
    assert [row.codec for row in smaller.tensors] == ["context"]
    assert [row.codec for row in larger.tensors] != ["context"]
    assert smaller.size_bytes < larger.size_bytes
    assert np.array_equal(read_tensors(larger.path)["w"], tensors["w"])


def test_a_source_that_is_not_there_is_named_with_the_folder_it_was_looked_for_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"source must be a file, got 'no.onnx'.*seen from {tmp_path}"):
        pack("no.onnx", tmp_path / "w.edge")
