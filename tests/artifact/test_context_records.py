"""Records of codec `context`: the codebook rides in the states, the codes are coded under contexts."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_edge.artifact.codebooks import AS_HALF, AS_THEY_ARE, CONSECUTIVE, split_codebook
from lightning_edge.artifact.tensors import CODECS, DTYPES, decode_tensor, read_record
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint
from lightning_edge.functional.context_coding import Pass, Plan, context_decode, encode_with, steps_allowed
from lightning_edge.functional.context_planning import context_encode
from lightning_edge.functional.contexts import Contexts

ONE = Pass(64, Contexts(0, 0, 1, 1, 1))
"""A pass with one context."""
MASK = Pass(64, Contexts(1, 0, 8, 3, 0))
FLOATS = np.array([-0.3, 0.0, 0.7], np.float32)


def record(payload, *, kind=1, shape=(4, 6)):
    dims = varint(len(shape)) + b"".join(varint(size) for size in shape)
    return bytes([kind]) + dims + bytes([CODECS.index("context")]) + varint(len(payload)) + payload


def encoded(codes, codebook, *, lanes=2, kind=1, alphabet=None, **changes):
    """The record of codes, shape (rows, columns), coded as is said."""
    chosen = {"geometry": (codes.shape[1], 1, 1), "zero": 1, "shift": 0, "mask": None, "values": ONE} | changes
    head, riders = split_codebook(codebook)
    data = encode_with(Plan(**chosen), codes, alphabet or len(codebook), riders=riders, lanes=lanes)
    return record(head + data, kind=kind, shape=codes.shape)


def decoded(data):
    return decode_tensor(read_record(ByteReader(data)))


def some_codes(rows, columns, alphabet, seed=0):
    return np.random.default_rng(seed).integers(0, alphabet, (rows, columns))


def codebook_of(kind, size, how):
    """As many values of an element type as asked for, stored in a way of one's own."""
    dtype = DTYPES[kind]
    if how == CONSECUTIVE:
        return np.arange(1, size + 1).astype(dtype)
    if how == AS_HALF:
        return (np.arange(size) / 4).astype(dtype)
    values = 3 * np.arange(size) if dtype.kind in "iu" else np.arange(size) / 7
    return values.astype(dtype)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(
    ("kind", "how"), [(1, AS_THEY_ARE), (1, AS_HALF), (3, CONSECUTIVE), (4, AS_THEY_ARE), (7, CONSECUTIVE), (11, 0)]
)
@pytest.mark.parametrize("lanes", [1, 8, 64])  # states that carry less than the codebook, and more
def test_every_way_of_coding_gives_back_every_element(kind, how, mask, shift, lanes):
    codebook, codes = codebook_of(kind, 20, how), some_codes(9, 12, 20)
    assert split_codebook(codebook)[0][1] == how
    data = encoded(codes, codebook, kind=kind, mask=mask, shift=shift, lanes=lanes, geometry=(2, 2, 3), zero=7)
    assert decoded(data).tobytes() == codebook[codes].tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([(1, 1, 1), (5, 1, 1), (2, 3, 3), (1, 2, 4), (3, 1, 2)]),
    st.integers(2, 40),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_any_plan_gives_back_any_codes(rows, geometry, alphabet, shift, masked, exponent, seed):
    codes = some_codes(rows, int(np.prod(geometry)), alphabet, seed)
    codebook = np.sort(np.random.default_rng(seed).normal(size=alphabet)).astype(np.float32)
    changes = {"geometry": geometry, "shift": shift, "mask": MASK if masked else None, "zero": seed % alphabet}
    data = encoded(codes, codebook, lanes=1 << exponent, **changes)
    try:
        found = decoded(data)
    except EdgeFormatError as error:
        assume("must not take more" not in str(error))  # too few lanes for so few bytes: no writer plans that
        raise
    assert found.tobytes() == codebook[codes].tobytes()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([(5, 1, 1), (2, 3, 3), (3, 1, 2)]),
    st.integers(2, 8),
    st.integers(0, 99),
)
def test_whatever_the_writer_plans_the_reader_takes(rows, geometry, alphabet, seed):
    codes = some_codes(rows, int(np.prod(geometry)), alphabet, seed).reshape(-1)
    coded = context_encode(codes, (rows, *geometry), alphabet, zero=seed % alphabet, riders=b"")
    if coded is not None:
        found, _ = context_decode(ByteReader(coded), (rows, *geometry), alphabet, riders=0)
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("masked", [False, True])
def test_a_tensor_of_nothing_but_zero_comes_back(masked):
    codes = np.ones((4, 6), dtype=np.int64)
    data = encoded(codes, FLOATS, mask=MASK if masked else None)
    assert decoded(data).tobytes() == np.zeros((4, 6), np.float32).tobytes()


def test_more_work_than_the_bytes_allow_is_refused_at_once():
    data = encoded(some_codes(4, 6, 3), FLOATS)
    payload = read_record(ByteReader(data)).payload
    payload = bytes(payload.take(payload.left))
    columns = 2 * steps_allowed(len(payload))
    with pytest.raises(EdgeFormatError, match="bytes must not take more than"):
        decoded(record(payload, shape=(4, columns)))
    with pytest.raises(EdgeFormatError, match="bytes must not take more than"):
        decoded(record(payload, shape=(columns, 6)))
    with pytest.raises(EdgeFormatError, match="planes of 1 x 1 must fill"):
        decoded(record(payload, shape=(1, (1 << 20) + 1)))


# Of a payload that begins with a codebook's size and kind; three floats ride in the two states, and behind these.
PLACES = {"flags": 2, "height": 3, "width": 4, "zero": 5, "kind": 6, "classes": 7, "mean": 8, "step": 10, "states": 11}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("flags", 16, "planes of 1 x 1 must fill 6 columns, flags be below 16, got 16"),
        ("flags", 1, "contexts must be of a known kind"),  # a mask's contexts have no directions
        ("height", 0, "planes of 0 x 1 must fill 6 columns"),
        ("height", 4, "planes of 4 x 1 must fill 6 columns"),
        ("width", 5, "planes of 1 x 5 must fill 6 columns"),
        ("width", 7, "a number must be at most 6"),
        ("zero", 3, "a number must be at most 2"),
        ("kind", 0x31, "contexts must be of a known kind"),
        ("kind", 0x00, "contexts must be of a known kind"),
        ("kind", 0x02, "contexts must be of a known kind"),
        ("kind", 0x09, "contexts must be of a known kind"),
        ("classes", 0, "contexts must be of a known kind with a mean and a step"),
        ("classes", 65, "contexts must be of a known kind with a mean and a step"),
        ("mean", 0, "contexts must be of a known kind with a mean and a step"),
        ("step", 0, "contexts must be of a known kind with a mean and a step"),
        ("states", 11, r"there must be at most 1024 states, got 2\*\*11"),
        ("states", 255, r"there must be at most 1024 states, got 2\*\*255"),
        ("states", 10, "bytes are announced|states must end"),
    ],
)
def test_heads_that_make_no_sense_are_refused(place, value, message):
    payload = read_record(ByteReader(encoded(some_codes(4, 6, 3), FLOATS))).payload
    damaged = bytearray(payload.take(payload.left))
    ones = {"flags": 0, "height": 1, "width": 1, "zero": 1, "kind": 1, "classes": 1, "step": 1, "states": 1, "mean": 64}
    assert {name: damaged[at] for name, at in PLACES.items()} == ones
    damaged[PLACES[place]] = value
    with pytest.raises(EdgeFormatError, match=message):
        decoded(record(bytes(damaged)))


def test_more_symbols_than_a_pass_may_have_are_refused():
    codes = some_codes(4, 6, 300)
    payload = read_record(ByteReader(encoded(codes, np.arange(300, dtype=np.int16), kind=5, shift=1))).payload
    damaged = bytearray(payload.take(payload.left))
    assert damaged[5] == 2  # flags: the shift, no mask
    damaged[5] = 0
    with pytest.raises(EdgeFormatError, match="a pass must have 1 to 256 symbols, got 300"):
        decoded(record(bytes(damaged), kind=5))


def test_a_mask_over_a_single_value_is_refused():
    plan = bytes([1, 1, 1, 0, *(0, 1, 64, 0, 1), *(1, 1, 64, 0, 1)])
    with pytest.raises(EdgeFormatError, match="a pass must have 1 to 256 symbols, got 0"):
        decoded(record(varint(1) + bytes([CONSECUTIVE, 5]) + plan + bytes(9), kind=3))


def test_a_code_above_the_alphabet_is_refused():
    codes = np.full((4, 6), 3)
    head, riders = split_codebook(FLOATS)
    plan = Plan((6, 1, 1), 1, 1, None, ONE)
    data = encode_with(plan, codes, 4, riders=riders, lanes=2)  # four codes, of which the codebook has three
    with pytest.raises(EdgeFormatError, match="a code must lie below 3, got 3"):
        decoded(record(head + data))


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_riders_and_streams_that_are_cut_short_are_found_out(cut):
    for lanes in (1, 2, 16):
        payload = read_record(ByteReader(encoded(some_codes(4, 6, 3), FLOATS, lanes=lanes))).payload
        data = bytes(payload.take(payload.left))
        with pytest.raises(EdgeFormatError):
            decoded(record(data[:-cut]))
        with pytest.raises(EdgeFormatError):
            decoded(record(data + bytes(2 * cut)))


def test_lower_bits_of_another_number_are_found_out():
    codes = some_codes(4, 6, 16)
    payload = read_record(ByteReader(encoded(codes, np.arange(16, dtype=np.int8), kind=3, shift=2))).payload
    data = bytearray(payload.take(payload.left))
    at = 3 + 10  # the codebook is a number, its kind and its first value; ten bytes of plan and states follow
    assert data[at] == codes.size * 2 // 8
    for changed, message in (
        (data[:at] + bytes([5]) + data[at + 2 :], "6 bytes are announced, 5 are left"),
        (data[:at] + bytes([7, 0]) + data[at + 1 :], "1 bytes are left over"),
        (data[:at] + bytes([25]) + data[at + 1 :], "a number must be at most 24"),
    ):
        with pytest.raises(EdgeFormatError, match=message):
            decoded(record(bytes(changed), kind=3))
