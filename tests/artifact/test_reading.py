import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import zstandard
from onnx import helper, numpy_helper

from lightning_edge import load_artifact, pack, unpack
from lightning_edge.artifact import EdgeFormatError, read_tensors
from lightning_edge.artifact.format import INDEX, META, TENSORS, join_sections
from lightning_edge.artifact.tensors import CODECS
from lightning_edge.functional.bytestream import varint

LIMIT = 1 << 20


def smooth(rng, shape):
    """Kernels whose neighbours are alike, of few values."""
    rough = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1, 1, 1)))
    rough = rough + np.roll(rough, 1, 2) + np.roll(rough, 1, 3)
    return (np.clip(np.round(2 * rough), -7, 7) / 3).astype(np.float32)


def make_tensors():
    """One small tensor for each codec, and one for each coder of symbols."""
    rng = np.random.default_rng(0)
    runs = np.zeros(3000, np.float32)
    runs[600:900] = np.where(rng.random(300) < 0.5, 0, rng.integers(1, 9, 300) / 7)
    ternary = np.zeros(2000, np.float32)
    ternary[rng.integers(900, 1100, 60)] = 0.25
    return {
        "constant": np.full((3, 50), np.nan, np.float32),
        "raw": rng.normal(size=(4, 5)).astype(np.float32),
        "planes": np.arange(200, dtype=np.int16),
        "half": rng.normal(size=20).astype(np.float16).astype(np.float32),
        "dense huffman": rng.integers(0, 4, 500).astype(np.int8),
        "dense rans": (rng.random(2000) < 0.1).astype(np.uint8) + (rng.random(2000) < 0.05).astype(np.uint8),
        "sparse": runs,
        "sparse of one value": ternary,
        "blocks": np.float32([[0.5, -1.25], [2.0, 3.5], [-0.75, 0.3]])[rng.integers(0, 3, (20, 8))].reshape(20, 16),
        "context": smooth(rng, (16, 8, 3, 3)),
        "context of a mask": np.where(
            rng.random((16, 100)) < rng.random((16, 1)), 0, smooth(rng, (16, 4, 5, 5)).reshape(16, 100)
        ),
        "empty": np.zeros((0, 3), np.float32),
    }


def make_model(tensors):
    nodes = [helper.make_node("Identity", [name], [f"out of {name}"]) for name in tensors]
    outputs = [
        helper.make_tensor_value_info(f"out of {name}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in tensors.items()
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "net", [], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("unpack") / "all.edge"
    report = pack(make_model(make_tensors()), path, recipe_hash="1234")
    codecs = {row.name: row.codec for row in report.tensors}
    assert set(codecs.values()) == set(CODECS)
    assert codecs == {"constant": "constant"} | {name: name.split(" ")[0] for name in codecs}
    return path


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def test_every_tensor_comes_back_bit_by_bit_and_can_be_written_to(file):
    tensors = make_tensors()
    back = read_tensors(file)
    assert {name: bits(array) for name, array in back.items()} == {
        name: bits(array) for name, array in tensors.items() if name != "empty"
    }
    assert all(array.flags.writeable for array in back.values())


def test_an_unpacked_onnx_file_is_valid_and_holds_every_tensor_under_its_name(file, tmp_path):
    assert unpack(file, tmp_path / "back.onnx") == tmp_path / "back.onnx"
    model = onnx.load(tmp_path / "back.onnx")
    onnx.checker.check_model(model, full_check=True)
    back = {tensor.name: bits(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer}
    assert back == {name: bits(array) for name, array in make_tensors().items()}


def test_packing_what_was_unpacked_gives_the_same_file(file, tmp_path):
    tensors = {f"t{index}": array for index, array in enumerate(make_tensors().values())}
    first = pack(tensors, tmp_path / "first.edge").path
    unpack(first, tmp_path / "w.safetensors")
    assert pack(tmp_path / "w.safetensors", tmp_path / "second.edge").path.read_bytes() == first.read_bytes()
    again = pack(unpack(file, tmp_path / "back.onnx"), tmp_path / "again.edge").path
    assert {name: bits(array) for name, array in read_tensors(again).items()} == {
        name: bits(array) for name, array in read_tensors(file).items()
    }


def test_an_unpacked_safetensors_file_is_read_by_its_own_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    tensors = make_tensors() | {"scalar": np.array(3.5), "flags": np.array([True, False]), "größe": np.arange(5)}
    pack(tensors, tmp_path / "w.edge")
    unpack(tmp_path / "w.edge", tmp_path / "w.safetensors")
    back = library.load_file(tmp_path / "w.safetensors")
    assert {name: bits(array) for name, array in back.items()} == {name: bits(array) for name, array in tensors.items()}


def test_bfloat16_keeps_its_type_in_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    import torch

    tensor = torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16)
    pack({"w": tensor}, tmp_path / "w.edge")
    back = library.load_file(unpack(tmp_path / "w.edge", tmp_path / "w.safetensors"))["w"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), tensor.view(torch.int16))


def test_a_file_of_tensors_alone_has_no_graph_to_unpack(tmp_path):
    pack({"w": np.arange(9)}, tmp_path / "w.edge")
    with pytest.raises(EdgeFormatError, match=r"the file must hold a graph to be run, got tensors alone: unpack it to"):
        unpack(tmp_path / "w.edge", tmp_path / "w.onnx")
    assert not (tmp_path / "w.onnx").exists()


def test_an_output_of_another_suffix_and_a_missing_file_are_named(file, tmp_path):
    with pytest.raises(ValueError, match=r"out must end in one of \['.onnx', '.safetensors'\], got 'w.pt'"):
        unpack(file, tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="path must be a file, got 'no.edge'"):
        unpack("no.edge", tmp_path / "w.onnx")


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_writer_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = pack({"w": np.arange(9)}, tmp_path / "w.edge").path
    before = path.read_bytes()
    write = Path.write_bytes

    def interrupted(self, data):
        if step == "write_bytes":
            write(self, data[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack({"w": np.arange(99)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def joined(parts):
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
    return join_sections(parts | {INDEX: compressor.compress(parts[INDEX])})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({META: b"\xff\xfe"}, "text must be UTF-8: invalid start byte"),
        ({INDEX: varint(3) + b"a\xffb"}, "text must be UTF-8"),
        ({INDEX: varint(100) + b"ab"}, "100 bytes are announced, 2 are left"),
        ({INDEX: b""}, "1 bytes are announced, 0 are left"),
        ({INDEX: varint(3) + b"a\na", TENSORS: bytes([1, 0, 0, 4, 0, 0, 0, 0]) * 2}, "tensor names must differ"),
        ({INDEX: varint(1) + b"a", TENSORS: bytes([1, 0, 0, 4, 0, 0, 0, 0]) * 2}, "8 bytes are left over"),
        ({INDEX: varint(0), TENSORS: b"\0"}, "1 bytes are left over"),
        ({INDEX: varint(900_000) + b"\n" * 900_000, TENSORS: b"\1"}, "must hold every tensor named, got more names"),
        ({INDEX: varint(0) + bytes(LIMIT)}, "at most 1,048,576 bytes must come out of zstd, got more"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, changed, message):
    parts = {META: b"0.1", INDEX: varint(0), TENSORS: b""}
    (tmp_path / "hostile.edge").write_bytes(joined(parts | changed))
    with pytest.raises(EdgeFormatError, match=message):
        read_tensors(tmp_path / "hostile.edge", max_bytes=LIMIT)


@pytest.mark.parametrize(
    "record",
    [
        bytes([1, 1]) + varint(1 << 28) + bytes([0, 4, 0, 0, 0, 0]),  # a constant of a gigabyte
        bytes([2, 3]) + varint(0) + varint(1 << 20) + varint(1 << 20) + bytes([1, 0]),
    ],
)
def test_a_tiny_file_that_claims_gigabytes_takes_no_memory(tmp_path, record):
    path = tmp_path / "hostile.edge"
    path.write_bytes(joined({META: b"", INDEX: varint(1) + b"w", TENSORS: record}))
    tracemalloc.start()
    with pytest.raises(EdgeFormatError):
        read_tensors(path, max_bytes=10_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("suffix", ["onnx", "safetensors"])
def test_unpacking_keeps_to_the_limit(tmp_path, suffix):
    path = tmp_path / "hostile.edge"
    record = bytes([1, 1]) + varint(1 << 28) + bytes([0, 4, 0, 0, 0, 0])
    path.write_bytes(joined({META: b"", INDEX: varint(1) + b"w" + b"graph", TENSORS: record}))
    with pytest.raises(EdgeFormatError, match="a number must be at most 9999"):
        unpack(path, tmp_path / f"out.{suffix}", max_bytes=10_000_000)
    with pytest.raises(EdgeFormatError, match="a number must be at most 9999"):
        load_artifact(path, max_bytes=10_000_000)
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.edge"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are those of Linux")
@pytest.mark.parametrize(
    "read", ["load_artifact(path)", "unpack(path, 'w.onnx')", "unpack(path, 'w.safetensors')", "inspect(path)"]
)
def test_more_than_the_memory_holds_is_refused(tmp_path, read):
    record = bytes([1, 1]) + varint(500_000_000) + bytes([0, 4, 0, 0, 0, 0])
    (tmp_path / "hostile.edge").write_bytes(joined({META: b"", INDEX: varint(1) + b"w" + b"graph", TENSORS: record}))
    program = f"""
        import resource
        from lightning_edge import load_artifact, unpack
        from lightning_edge.artifact import EdgeFormatError, inspect
        path = "hostile.edge"
        resource.setrlimit(resource.RLIMIT_AS, (3 << 29, resource.RLIM_INFINITY))
        try:
            {read}
        except EdgeFormatError as error:
            assert "must expand to what the memory holds" in str(error), error
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_limit_is_of_all_tensors_together(tmp_path):
    pack({f"t{index}": np.zeros(1000, np.float32) for index in range(10)}, tmp_path / "w.edge")
    assert len(read_tensors(tmp_path / "w.edge", max_bytes=40_100)) == 10
    with pytest.raises(EdgeFormatError, match="must be at most|tensors must expand to at most"):
        read_tensors(tmp_path / "w.edge", max_bytes=39_000)
