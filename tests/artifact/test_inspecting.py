import numpy as np
import pytest
from test_context_records import FLOATS, encoded, some_codes

from lightning_edge import pack
from lightning_edge.artifact import inspect
from lightning_edge.artifact.inspecting import streams
from lightning_edge.artifact.tensors import CODECS, encode_tensor, read_record
from lightning_edge.functional import rans
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint
from lightning_edge.functional.rans import rans_encode


def found(data):
    return streams(read_record(ByteReader(data)))


def record(codec, payload, *, kind=1, shape=(4,)):
    dims = varint(len(shape)) + b"".join(varint(size) for size in shape)
    return bytes([kind]) + dims + bytes([CODECS.index(codec)]) + varint(len(payload)) + payload


def tensor(codec):
    """A tensor whose smallest codec is this one."""
    rng = np.random.default_rng(0)
    rows, places = np.arange(1, 51)[:, None], np.arange(20_000)
    return {
        "constant": np.zeros(9, np.float32),
        "raw": rng.normal(size=20).astype(np.float32),
        "half": rng.normal(size=300).astype(np.float16).astype(np.float32),
        "planes": rng.normal(size=100).astype(np.float32),
        "dense": rng.integers(-5, 5, 5000).astype(np.float32),
        "sparse": np.where((places // 500 % 10 == 0) & (places % 3 == 0), rng.integers(1, 5, 20_000), 0).astype("f4"),
        "blocks": np.float32([[1, 2, 3, 4], [9, 8, 7, 6]])[rng.integers(0, 2, 600)].reshape(60, 40),
        "context": np.floor(rng.normal(size=(50, 64)) * rows / 5).astype(np.float32),
    }[codec]


@pytest.mark.parametrize(
    ("codec", "coders"),
    [
        ("constant", []),
        ("raw", []),
        ("half", []),
        ("planes", ["bytes", "bytes", "bytes", "rans"]),
        ("dense", ["rans"]),
        ("sparse", ["rans", "huffman"]),
        ("blocks", ["huffman"]),
        ("context", ["adaptive"]),
    ],
)
def test_the_streams_of_every_codec_are_found_by_their_heads(codec, coders):
    data, chosen = encode_tensor(tensor(codec), 1)
    assert chosen == codec
    streams_found = found(data)
    assert [stream.coder for stream in streams_found] == coders
    assert all((stream.lanes > 0) == (stream.coder in ("rans", "adaptive")) for stream in streams_found)


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_static_lanes_cost_what_is_said(monkeypatch, lanes):
    symbols = np.random.default_rng(0).integers(0, 3, 4096)
    codebook = varint(3) + b"\0" + np.arange(3, dtype=np.float32).tobytes()

    def coded(lanes):
        monkeypatch.setattr(rans, "_lanes", lambda size, count: lanes)
        return record("dense", codebook + b"\2" + rans_encode(symbols, 3), shape=(4096,))

    (stream,), (one,) = found(coded(lanes)), found(coded(1))
    assert (stream.coder, stream.lanes, one.lanes) == ("rans", lanes, 1)
    assert len(coded(lanes)) - len(coded(1)) == pytest.approx(stream.lane_bytes - one.lane_bytes, abs=3)
    assert 2 * lanes <= stream.lane_bytes <= 4 * lanes


@pytest.mark.parametrize("lanes", [2, 32, 128])
def test_adaptive_lanes_cost_what_is_said_less_what_rides_in_them(lanes):
    codes = some_codes(128, 200, 3)
    (stream,), (one,) = found(encoded(codes, FLOATS, lanes=lanes)), found(encoded(codes, FLOATS, lanes=1))
    assert (stream.coder, stream.lanes, one.lane_bytes) == ("adaptive", lanes, 0.5)
    assert stream.lane_bytes == 2.5 * lanes - min(12, 2 * lanes)
    difference = len(encoded(codes, FLOATS, lanes=lanes)) - len(encoded(codes, FLOATS, lanes=1))
    assert difference == pytest.approx(stream.lane_bytes - one.lane_bytes, abs=2 + lanes / 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (record("dense", varint(1) + b"\0" + bytes(4) + b"\7"), "coder 7 is unknown"),
        (record("blocks", b"\0" + varint(2) + b"\0" + bytes(8)), "1 bytes are announced, 0 are left"),
        (record("dense", varint(2) + b"\0" + bytes(8) + b"\2\x0c\0"), "1 bytes are announced, 0 are left"),
        (record("context", b"", shape=(2, 2)), "1 bytes are announced, 0 are left"),
    ],
)
def test_a_hostile_head_is_refused(data, message):
    with pytest.raises(EdgeFormatError, match=message):
        found(data)


def test_zeros_and_distinct_values_are_counted(tmp_path):
    flat = np.zeros(2000, np.float32)
    flat[np.random.default_rng(0).integers(900, 1100, 60)] = 0.25
    (row,) = inspect(pack({"w": flat}, tmp_path / "w.edge").path).tensors
    zeros = int((flat == 0).sum())
    assert (row.shape, row.dtype, row.distinct, row.zeros, row.codec) == ((2000,), "float32", 2, zeros, "sparse")
    assert row.bits_per_weight == 8 * row.size_bytes / 2000
    share = zeros / 2000
    assert row.entropy_bits == pytest.approx(-share * np.log2(share) - (1 - share) * np.log2(1 - share))


def test_tensors_of_one_value_and_of_none_have_no_entropy_and_no_coder(tmp_path):
    tensors = {"one": np.ones((3, 50), np.float32), "none": np.zeros((0, 3), np.int8)}
    rows = inspect(pack(tensors, tmp_path / "w.edge").path).tensors
    assert [(row.entropy_bits, row.coder, row.lanes, row.lane_bytes) for row in rows] == [(0.0, "", 0, 0.0)] * 2
    assert [row.distinct for row in rows] == [1, 0]


def test_totals_add_up_to_the_file_and_to_what_it_expands_to(tmp_path):
    tensors = {"one": tensor("dense"), "größe": tensor("context")}
    found = inspect(pack(tensors, tmp_path / "w.edge", recipe_hash="abc").path)
    container, index, packed, file = found.totals
    assert container.size_bytes + index.size_bytes + packed.size_bytes == file.size_bytes == found.size_bytes
    assert found.size_bytes == (tmp_path / "w.edge").stat().st_size
    assert (index.size_bytes, index.raw_bytes) == (found.graph_bytes, len("one\ngröße".encode()))
    assert packed.size_bytes == sum(row.size_bytes for row in found.tensors)
    assert packed.raw_bytes == sum(array.nbytes for array in tensors.values())
    assert file.raw_bytes == packed.raw_bytes + index.raw_bytes
    assert found.lane_bytes == sum(row.lane_bytes for row in found.tensors) > 0


def test_types_are_named(tmp_path):
    pack({"f": np.zeros(1, np.float64), "b": np.zeros(1, bool)}, tmp_path / "w.edge")
    assert [row.dtype for row in inspect(tmp_path / "w.edge").tensors] == ["float64", "bool"]
