import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.bytestream import BitReader, BitWriter, ByteReader, EdgeFormatError, varint

properties = settings(max_examples=100, deadline=None)


@properties
@given(st.lists(st.integers(0, (1 << 63) - 1)))
def test_numbers_come_back_and_nothing_is_left(values):
    reader = ByteReader(b"".join(varint(value) for value in values))
    assert [reader.varint() for _ in values] == values
    reader.end()


@properties
@given(st.integers(0, (1 << 63) - 1))
def test_a_number_takes_a_byte_for_each_seven_bits(value):
    assert len(varint(value)) == max(1, -(-value.bit_length() // 7))


@properties
@given(st.integers(1, (1 << 63) - 1))
def test_a_number_above_its_limit_is_refused(value):
    assert ByteReader(varint(value)).varint(limit=value) == value
    with pytest.raises(EdgeFormatError, match=f"a number must be at most {value - 1}, got more"):
        ByteReader(varint(value)).varint(limit=value - 1)


@pytest.mark.parametrize("data", [b"\xff" * 100, b"\x80" * 100 + b"\x01"])
def test_a_number_without_end_is_refused(data):
    with pytest.raises(EdgeFormatError, match="a number must be at most"):
        ByteReader(data).varint()


def test_a_number_that_is_cut_off_is_refused():
    with pytest.raises(EdgeFormatError, match="1 bytes are announced, 0 are left, at byte 1"):
        ByteReader(b"\x80").varint()


def test_an_error_says_where_in_the_file_and_why():
    reader = ByteReader(b"abcdef", offset=100)
    reader.take(1)
    inner = reader.sub(3)
    inner.byte()
    with pytest.raises(EdgeFormatError) as caught:
        inner.take(3)
    assert caught.value.offset == 102
    assert caught.value.reason == "3 bytes are announced, 2 are left"
    assert isinstance(caught.value, ValueError)
    assert reader.offset == 104


def test_bytes_left_over_are_refused():
    reader = ByteReader(b"abc")
    reader.byte()
    with pytest.raises(EdgeFormatError, match="2 bytes are left over, at byte 1"):
        reader.end()


@properties
@given(st.lists(st.integers(0, 40).flatmap(lambda width: st.tuples(st.integers(0, (1 << width) - 1), st.just(width)))))
def test_bits_come_back_in_whole_bytes(fields):
    writer = BitWriter()
    for value, width in fields:
        writer.write(value, width)
    data = writer.bytes()
    assert len(data) == -(-sum(width for _, width in fields) // 8)
    reader = ByteReader(data)
    bits = BitReader(reader)
    assert [bits.read(width) for _, width in fields] == [value for value, _ in fields]
    reader.end()


@properties
@given(st.lists(st.integers(0, 1 << 20), min_size=1), st.integers(0, 12))
def test_exp_golomb_numbers_come_back(values, order):
    writer = BitWriter()
    writer.write_exp_golomb(values, order)
    bits = BitReader(ByteReader(writer.bytes()))
    assert [bits.read_exp_golomb(order, limit=1 << 20) for _ in values] == values


def test_exp_golomb_codes_are_those_of_the_textbook():
    writer = BitWriter()
    writer.write_exp_golomb([0, 1, 2, 3], 0)
    assert writer.bytes() == int("1010011001000000", 2).to_bytes(2, "big")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0" * 10, "at most 32 leading zeros"),
        (b"\0\0\1\xff\xff\xff", "must be at most 9, got"),
        (b"\0\1", "1 bytes are announced, 0 are left"),
    ],
)
def test_a_hostile_exp_golomb_code_is_refused(data, message):
    with pytest.raises(EdgeFormatError, match=message):
        BitReader(ByteReader(data)).read_exp_golomb(0, limit=9)
