import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.artifact.tensors import (
    BFLOAT16,
    CODECS,
    DTYPES,
    _candidates,
    decode_tensor,
    encode_tensor,
    order0_bits,
    read_record,
)
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint

SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (2, 3), (40, 30), (4, 1, 5, 5), (1,) * 20]
DENSITIES = ["random bits", "few values", "one value", "mostly zero", "long runs", "whole numbers"]


def make(kind, shape, density, seed):
    """Elements of any bits: NaNs with payloads, infinities, denormals and -0.0 among them."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[kind]
    count = int(np.prod(shape))
    any_bits = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype) if count else np.zeros(0, dtype)
    few = np.frombuffer(rng.bytes(5 * dtype.itemsize), dtype)
    chosen = few[rng.integers(0, 5, count)]
    flat = {
        "random bits": any_bits,
        "few values": chosen,
        "one value": np.repeat(few[:1], count),
        "mostly zero": np.where(rng.random(count) < 0.9, np.zeros(count, dtype), chosen),
        "long runs": np.where(np.arange(count) % 600 < 590, np.zeros(count, dtype), any_bits),
        "whole numbers": rng.integers(0, 2 if kind == 9 else 100, count).astype(dtype),
    }[density]
    return flat.astype(dtype, copy=False).reshape(shape)


def record(codec, payload, *, kind=1, shape=(4,)):
    dims = varint(len(shape)) + b"".join(varint(size) for size in shape)
    return bytes([kind]) + dims + bytes([CODECS.index(codec)]) + varint(len(payload)) + payload


def comes_back(data, array, kind):
    reader = ByteReader(data)
    decoded = decode_tensor(read_record(reader))
    reader.end()
    assert decoded.tobytes() == array.tobytes()
    assert decoded.shape == array.shape
    assert decoded.dtype == DTYPES[kind]


def round_trip(array, kind):
    data, codec = encode_tensor(array, kind)
    comes_back(data, array, kind)
    return codec, len(data)


def round_trips(array, kind):
    """Like round_trip, of every codec that was tried, not of the smallest alone; return their names."""
    flat = np.ascontiguousarray(array, DTYPES[kind]).reshape(-1)
    tried = list(_candidates(flat, array.shape, kind, adaptive=True))
    for codec, payload in tried:
        comes_back(record(codec, payload, kind=kind, shape=array.shape), array, kind)
    return {codec for codec, _ in tried}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(list(DTYPES)), st.sampled_from(SHAPES), st.sampled_from(DENSITIES), st.integers(0, 999))
def test_every_type_shape_and_bit_pattern_comes_back(kind, shape, density, seed):
    round_trips(make(kind, shape, density, seed), kind)


@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_comes_back_from_every_codec(kind):
    tried = set().union(*(round_trips(make(kind, (20, 60), density, 3), kind) for density in DENSITIES))
    tried |= round_trips(np.repeat(make(kind, (20, 1), "whole numbers", 0), 60, axis=1), kind)
    assert tried >= set(CODECS) - {"half"}


def test_blocks_whose_values_only_begin_and_end_like_consecutive_ones_come_back():
    vectors = np.array([[0, 9], [7, 3]], np.int8)[np.random.default_rng(0).integers(0, 2, (40, 30))]
    assert "blocks" in round_trips(vectors.reshape(40, 60), 3)


def test_without_adaptive_contexts_the_codec_is_left_out():
    array = energetic_rows()
    assert encode_tensor(array, 1)[1] == "context"
    data, codec = encode_tensor(array, 1, adaptive=False)
    comes_back(data, array, 1)
    assert codec != "context"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, float("nan"), -float("inf"), 1e-45, 1e30]), max_size=400))
def test_zeros_of_both_signs_and_what_is_not_a_number_stay_what_they_are(values):
    round_trip(np.array(values, np.float32), 1)


def test_nan_payloads_and_signs_survive_in_every_codec():
    nans = np.array([0x7F800001, 0xFFC12345, 0x7FC00000, 0x80000000, 0], np.uint32).view(np.float32)
    for repeats in (1, 20, 500):
        round_trips(np.repeat(nans, repeats), 1)
        round_trips(np.tile(nans, repeats).reshape(5, -1), 1)


def sparse_weights(count, density, values, seed=0):
    rng = np.random.default_rng(seed)
    codebook = np.sort(rng.normal(size=values)).astype(np.float32)
    return np.where(rng.random(count) < density, codebook[rng.integers(0, values, count)], 0).astype(np.float32)


def clustered_weights(count, values):
    """Whole rows of zeros between rows that are half full, as where units died."""
    return np.where(np.arange(count) // 500 % 10 == 0, sparse_weights(count, 0.5, values), 0).astype(np.float32)


def energetic_rows():
    """Rows of different energy: what contexts are for."""
    rough = np.random.default_rng(0).normal(size=(50, 64)) * np.arange(1, 51)[:, None]
    return np.floor(rough / 5).astype(np.float32)


@pytest.mark.parametrize(
    ("codec", "array"),
    [
        ("constant", np.full((9, 9), -0.0, np.float32)),
        ("raw", np.random.default_rng(0).normal(size=20).astype(np.float32)),
        ("planes", np.random.default_rng(0).normal(size=100).astype(np.float32)),
        ("raw", np.zeros(0, np.float32)),
        ("blocks", np.float32([[1, 2, 3, 4], [9, 8, 7, 6]])[np.arange(600) ** 2 % 7 % 2].reshape(60, 40)),
        ("context", energetic_rows()),
        ("half", np.random.default_rng(0).normal(size=300).astype(np.float16).astype(np.float32)),
        ("dense", np.random.default_rng(0).integers(-5, 5, 5000).astype(np.float32)),
        ("sparse", clustered_weights(50_000, 16)),
        ("sparse", clustered_weights(50_000, 1)),
    ],
)
def test_each_codec_is_taken_where_it_is_smallest(codec, array):
    assert round_trip(array, 1)[0] == codec


@pytest.mark.parametrize("density", [0.0003, 0.003, 0.03, 0.3])
@pytest.mark.parametrize("values", [1, 2, 32])
def test_sparse_weights_come_back_near_their_entropy(density, values):
    weights = sparse_weights(60_000, density, values)
    _, size = round_trip(weights, 1)
    assert size <= 1.04 * order0_bits(weights) * weights.size / 8 + 8 * values + 32


@pytest.mark.parametrize("gap", [13, 14, 15, 29, 30, 62, 126, 127, 254, 255, 256, 508, 50_000])
@pytest.mark.parametrize("trailing", [0, 1, 1000])
def test_runs_of_zeros_around_every_escape_come_back(gap, trailing):
    rng = np.random.default_rng(gap)
    piece = np.concatenate([np.zeros(gap), [1.0]])
    flat = np.concatenate([np.tile(piece, 1 + 9_000 // gap), np.zeros(trailing)])
    flat[rng.random(len(flat)) < 0.001] = 2.5
    round_trip(flat.astype(np.float32), 1)


def test_many_distinct_values_come_back():
    for distinct in (256, 257, 258, 8192, 8193):
        rng = np.random.default_rng(distinct)
        values = rng.permutation(np.arange(4 * distinct) % distinct).astype(np.int32)
        round_trip(values, 6)
        round_trip(np.where(rng.random(len(values)) < 0.5, 0, values).astype(np.int32), 6)


def test_arrays_of_any_layout_come_back_in_row_major_order():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array.T, array[::2, ::-1], array.astype(">f4")):
        record, _ = encode_tensor(view, 1)
        assert np.array_equal(decode_tensor(read_record(ByteReader(record))), view)


@pytest.mark.parametrize("density", DENSITIES)
def test_every_tensor_can_be_written_to(density):
    array = make(1, (40, 30), density, 0)
    decoded = decode_tensor(read_record(ByteReader(encode_tensor(array, 1)[0])))
    decoded[0, 0] = 1.0
    assert decoded[0, 0] == 1.0


def test_entropy_is_that_of_the_bits():
    assert order0_bits(np.array([0.0, -0.0])) == 1.0
    assert order0_bits(np.zeros(0)) == 0.0


ONE_VALUE = varint(1) + b"\0" + np.float32(2).tobytes()
TWO_VALUES = varint(2) + b"\0" + np.array([1, 2], np.float32).tobytes()
SYMBOL_0 = b"\x00\x00"


def sparse(live, escape, symbols, stream, values=SYMBOL_0):
    return ONE_VALUE + varint(live) + bytes([escape]) + varint(symbols) + varint(len(stream)) + stream + values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (record("raw", bytes(16), kind=8), "element type 8 is unknown"),
        (record("raw", bytes(16))[:3] + b"\x08\x00", "codec 8 is unknown"),
        (record("raw", bytes(15)), "16 bytes are announced, 15 are left"),
        (record("raw", bytes(17)), "1 bytes are left over"),
        (record("raw", b"", shape=(1,) * 65), "a number must be at most 64"),
        (record("constant", bytes(3)), "4 bytes are announced, 3 are left"),
        (record("constant", bytes(4), shape=(1 << 30, 1 << 30)), "tensors must expand to at most 2,147,483,647 bytes"),
        (record("raw", b"", shape=(0, *[1 << 30] * 9)), "tensors must expand to at most"),
        (record("constant", bytes(4), shape=(1 << 60,)), "a number must be at most"),
        (record("half", bytes(8), kind=11), "only float32 elements can be stored as float16, got float64"),
        (record("half", b"\x00\x7e" * 4), "float16 must be numbers to stand for float32"),
        (record("context", varint(300) + b"\2\0", kind=3, shape=(2, 2)), "only rows of up to 256 values"),
        (record("half", bytes(6)), "8 bytes are announced, 6 are left"),
        (record("planes", b"\x00\x00"), "1 bytes are announced, 0 are left"),
        (record("planes", (varint(2) + b"\x00\x05") * 4 + b"x"), "1 bytes are left over"),
        (record("blocks", b"\x03"), "blocks must have one of the sizes"),
        (record("blocks", b"\x04", shape=(2, 2)), "blocks must have one of the sizes"),
        (record("blocks", b"\x02" + ONE_VALUE), "a codebook must hold whole blocks of 2, got 1 values"),
        (record("context", TWO_VALUES), "only rows of up to 4096 values can have contexts"),
        (record("context", varint(5000) + b"\0", shape=(2, 2)), "only rows of up to 4096 values can have contexts"),
        (record("dense", varint(0) + b"\0" + SYMBOL_0), "a codebook must have values of float32, got 0"),
        (record("dense", varint(8193) + b"\0"), "a number must be at most 8192"),
        (record("dense", varint(2) + b"\2"), "a codebook must have values of float32, got 2 of width 2"),
        (record("dense", varint(2) + b"\3", kind=3), "a codebook must have values of int8, got 2 of width 3"),
        (record("dense", varint(1) + b"\1\0\0" + SYMBOL_0, kind=6), "a codebook must have values of int32"),
        (record("dense", TWO_VALUES + b"\x00\x02"), "a symbol must lie below 2, got 2"),
        (record("sparse", sparse(1, 15, 1, SYMBOL_0)), "the escape must be one of"),
        (record("sparse", sparse(5, 14, 5, SYMBOL_0)), "a number must be at most 4"),
        (record("sparse", sparse(2, 14, 1, SYMBOL_0)), "2 elements must have a gap each, got 1"),
        (record("sparse", sparse(0, 14, 1, b"\x00\x0e")), "0 elements must have a gap each, got 0"),
        (record("sparse", sparse(1, 14, 1, b"\x00\x04")), "elements must lie below 4, got one at 4"),
        (record("sparse", sparse(1, 14, 1, b"\x00\x0f")), "a symbol must lie below 15, got 15"),
        (record("sparse", sparse(1, 14, 9, SYMBOL_0)), "a number must be at most 4"),
        (record("sparse", sparse(1, 14, 1, SYMBOL_0, b"\x00\x01")), "a symbol must lie below 1, got 1"),
        (record("sparse", sparse(1, 14, 1, SYMBOL_0 + b"\0")), "1 bytes are left over"),
        (record("sparse", sparse(1, 14, 1, SYMBOL_0, SYMBOL_0 + b"\0")), "1 bytes are left over"),
    ],
)
def test_a_hostile_record_is_refused(data, message):
    with pytest.raises(EdgeFormatError, match=message):
        decode_tensor(read_record(ByteReader(data)))


def test_a_sparse_tensor_without_elements_is_all_zeros():
    data = record("sparse", sparse(0, 14, 0, SYMBOL_0))
    assert decode_tensor(read_record(ByteReader(data))).tolist() == [0.0] * 4


def test_a_limit_is_kept_before_memory_is_taken():
    data = record("constant", bytes(4), shape=(1000, 1000))
    assert decode_tensor(read_record(ByteReader(data), limit=4_000_000)).nbytes == 4_000_000
    with pytest.raises(EdgeFormatError, match="tensors must expand to at most 3,999,999 bytes, got shape"):
        read_record(ByteReader(data), limit=3_999_999)


@pytest.mark.parametrize("kind", [3, 1])
@pytest.mark.parametrize("density", [0.02, 0.9])
def test_decoding_takes_no_more_than_the_promised_bytes_per_element(kind, density):
    weights = sparse_weights(30_000, density, 3)
    array = weights if kind == 1 else np.sign(weights).astype(np.int8)
    read = read_record(ByteReader(encode_tensor(array, kind)[0]))
    tracemalloc.start()
    decode_tensor(read)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= array.nbytes + 48 * array.size + (1 << 20)


def test_bfloat16_is_kept_as_its_bits():
    assert round_trip(np.array([0x3F80, 0x8000, 0x7FC1], np.uint16), BFLOAT16)[0] == "raw"
