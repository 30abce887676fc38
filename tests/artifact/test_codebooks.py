import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.artifact.codebooks import (
    AS_HALF,
    AS_THEY_ARE,
    BFLOAT16,
    CONSECUTIVE,
    codebook_head,
    find_codebook,
    is_half,
    read_codebook,
    split_codebook,
)
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint


def stored(values):
    """How a codebook is stored, and its bytes."""
    data = b"".join(split_codebook(values))
    reader = ByteReader(data)
    back = read_codebook(reader, values.dtype)
    reader.end()
    assert back.tobytes() == values.tobytes()
    return codebook_head(ByteReader(data), values.dtype)[1], len(data)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["i1", "u1", "<i2", "<u2", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8", "?"]), st.binary(min_size=8)
)
def test_any_codebook_comes_back(dtype, data):
    values = np.frombuffer(data[: len(data) // 8 * 8], "?" if dtype == "?" else dtype)
    stored(values)


@pytest.mark.parametrize(
    ("values", "kind", "size"),
    [
        (np.arange(-5, 6, dtype=np.int8), CONSECUTIVE, 3),
        (np.arange(300, 500).astype(np.int64), CONSECUTIVE, 11),
        (np.array([2**63, 2**63 + 1], np.uint64), CONSECUTIVE, 10),
        (np.array([-1, 1], np.int32), AS_THEY_ARE, 10),
        (np.array([0, 9, 7, 3], np.int8), AS_THEY_ARE, 6),  # first and last alone do not tell
        (np.array([255, 0], np.uint8), AS_THEY_ARE, 4),
        (np.array([-1.5, 0.0, 2.0], np.float32), AS_HALF, 8),
        (np.array([-1.5, 0.0, 2.0], np.float64), AS_THEY_ARE, 26),
        (np.array([0.1, 0.2], np.float32), AS_THEY_ARE, 10),
        (np.array([False, True]), AS_THEY_ARE, 4),
    ],
)
def test_consecutive_numbers_take_one_and_what_float16_holds_takes_half(values, kind, size):
    assert stored(values) == (kind, size)


def test_what_float16_does_not_hold_bit_by_bit_is_no_half():
    assert is_half(np.array([1.5, -0.0, np.inf, 6e-8], np.float32)[:3])
    for value in (0.1, 65520.0, 1e-30, np.nan):
        assert not is_half(np.array([1.0, value], np.float32))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 4, 5], [1, 2, 3, 4, 5]),  # one is missing
        ([0, 1, 2, 3, 4, 6, 7, 9, 10, 11], list(range(12))),
        ([0, 2, 4, 6], [0, 2, 4, 6]),  # 7 are more than one and a half times 4
        ([-128, 127], [-128, 127]),
        ([-2, -1, 0, 1], [-2, -1, 0, 1]),
    ],
)
def test_whole_numbers_that_nearly_follow_each_other_get_the_missing_ones(values, expected):
    flat = np.repeat(np.array(values, np.int8), 5)
    codebook, codes, _ = find_codebook(flat, 3)
    assert codebook.tolist() == expected
    assert np.array_equal(codebook[codes], flat)


def test_gaps_at_the_ends_of_the_range_do_not_overflow():
    for dtype, kind in ((np.int64, 7), (np.uint64, 13)):
        info = np.iinfo(dtype)
        for values in ([info.min, info.max], [info.max - 3, info.max - 1, info.max], [info.min, info.min + 2]):
            flat = np.repeat(np.array(values, dtype), 4)
            codebook, codes, _ = find_codebook(flat, kind)
            assert np.array_equal(codebook[codes], flat)
            stored(codebook)


def test_values_are_in_the_order_of_what_they_stand_for():
    flat = np.tile(np.array([0x3F80, 0xBF80, 0x0000, 0xC000], np.uint16), 4)  # 1, -1, 0, -2 in bfloat16
    codebook, codes, zero = find_codebook(flat, BFLOAT16)
    assert codebook.tolist() == [0xC000, 0xBF80, 0x0000, 0x3F80]
    assert zero == 2
    assert np.array_equal(codebook[codes], flat)


def test_the_value_nearest_to_zero_is_found_beside_what_is_not_a_number():
    flat = np.tile(np.array([np.nan, 5.0, -3.0, np.inf], np.float32), 4)
    codebook, codes, zero = find_codebook(flat, 1)
    assert codebook[zero] == -3.0
    assert codebook[codes].tobytes() == flat.tobytes()


def test_zeros_of_both_signs_are_two_values():
    codebook, _, _ = find_codebook(np.tile(np.array([0.0, -0.0], np.float32), 4), 1)
    assert len(codebook) == 2


@pytest.mark.parametrize("flat", [np.zeros(10), np.arange(10.0), np.zeros(0), np.arange(16_400) % 8200])
def test_one_value_many_values_and_no_value_have_no_codebook(flat):
    assert find_codebook(flat.astype(np.float32), 1) is None


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        (b"", "<f4", "1 bytes are announced, 0 are left"),
        (varint(0) + b"\0", "<f4", "a codebook must have values of float32, got 0 of width 0"),
        (varint(2) + b"\3", "<f4", "got 2 of width 3"),
        (varint(2) + b"\2", "<f4", "got 2 of width 2"),
        (varint(2) + b"\1", "<f8", "got 2 of width 1"),
        (varint(2) + b"\2\0", "?", "got 2 of width 2"),
        (varint(2) + b"\0" + bytes(7), "<f4", "8 bytes are announced, 7 are left"),
        (varint(2) + b"\1" + bytes(3), "<f4", "4 bytes are announced, 3 are left"),
        (varint(8193) + b"\0", "<f4", "a number must be at most 8192"),
    ],
)
def test_a_hostile_codebook_is_refused(data, dtype, message):
    with pytest.raises(EdgeFormatError, match=message):
        read_codebook(ByteReader(data), np.dtype(dtype))


def test_consecutive_numbers_beyond_the_type_wrap_around():
    data = varint(3) + bytes([CONSECUTIVE, 254])
    assert read_codebook(ByteReader(data), np.dtype("u1")).tolist() == [254, 255, 0]
