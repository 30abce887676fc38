import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError
from lightning_edge.functional.coding import entropy_bits
from lightning_edge.functional.context_coding import (
    Pass,
    Plan,
    context_decode,
    encode_with,
    steps,
    steps_allowed,
)
from lightning_edge.functional.context_planning import _adaptive_bytes, context_encode
from lightning_edge.functional.contexts import Contexts


def smooth_kernels(shape, *, scale=6.0, seed=0):
    """Codes of kernels whose neighbours are alike and whose rows differ in energy, zero in the middle."""
    generator = np.random.default_rng(seed)
    rough = generator.normal(size=shape)
    for axis in (2, 3):
        rough = rough + np.roll(rough, 1, axis)
    rough *= np.exp(generator.normal(size=(shape[0], 1, 1, 1)))
    return np.clip(np.round(scale / 2 * rough), -scale, scale).astype(np.int64) + int(scale)


def round_trip(codes, shape, alphabet, *, zero, riders=b""):
    data = context_encode(codes.reshape(-1), shape, alphabet, zero=zero, riders=riders)
    assert data is not None
    found, carried = context_decode(ByteReader(data), shape, alphabet, riders=len(riders))
    assert np.array_equal(found, codes.reshape(-1))
    assert carried == riders
    return data


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([(3,), (16,), (2, 3, 3), (3, 1, 5), (1, 1, 1), (4, 4)]),
    st.integers(2, 700),
    st.floats(0, 1),
    st.integers(0, 99),
    st.binary(max_size=80),
)
def test_any_codes_come_back(rows, columns, alphabet, zeros, seed, riders):
    generator = np.random.default_rng(seed)
    shape = (rows, *columns)
    zero = int(generator.integers(alphabet))
    codes = np.where(generator.random(shape) < zeros, zero, generator.integers(0, alphabet, shape))
    round_trip(codes, shape, alphabet, zero=zero, riders=riders)


def test_likeness_of_neighbours_and_rows_is_worth_a_tenth_of_order_zero():
    codes = smooth_kernels((64, 32, 3, 3))
    data = round_trip(codes, codes.shape, 13, zero=6)
    assert len(data) < 0.9 * entropy_bits(np.bincount(codes.reshape(-1))) * codes.size / 8


def test_the_mask_of_a_sparse_tensor_is_coded_first_and_pays():
    generator = np.random.default_rng(0)
    codes = smooth_kernels((48, 16, 5, 5), scale=8)
    density = generator.random((48, 1, 1, 1)) ** 3
    codes = np.where(generator.random(codes.shape) < density, codes, 8)
    data = round_trip(codes, codes.shape, 17, zero=8)
    assert data[0] & 1
    assert len(data) < 0.9 * entropy_bits(np.bincount(codes.reshape(-1))) * codes.size / 8


def test_noise_costs_hardly_more_than_its_entropy():
    codes = np.random.default_rng(0).integers(0, 16, (64, 512))
    assert len(round_trip(codes, codes.shape, 16, zero=8)) < 1.01 * codes.size / 2


def test_lower_bits_of_a_large_alphabet_are_left_as_they_are():
    codes = np.clip(np.round(np.random.default_rng(0).normal(128, 30, (32, 288))), 0, 255).astype(np.int64)
    data = round_trip(codes, codes.shape, 256, zero=128)
    assert data[0] >> 1 > 0


def test_the_price_of_counts_is_that_of_coding_one_symbol_after_the_other():
    generator = np.random.default_rng(0)
    contexts, symbols = generator.integers(0, 3, 500), generator.integers(0, 5, 500)
    counts, bits = np.full((3, 5), 0.4), 0.0
    for context, symbol in zip(contexts, symbols, strict=True):
        bits -= np.log2(counts[context, symbol] / counts[context].sum())
        counts[context, symbol] += 1
    assert _adaptive_bytes(contexts, symbols, 3, 5) == pytest.approx(bits / 8, rel=1e-9)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0)])
def test_tensors_without_rows_and_columns_are_not_for_this_coder(shape):
    assert context_encode(np.zeros(int(np.prod(shape)), dtype=np.int64), shape, 4, zero=0, riders=b"") is None


def some_stream(**changes):
    plain = Pass(64, Contexts(0, 0, 1, 1, 1))
    chosen = {"geometry": (6, 1, 1), "zero": 0, "shift": 0, "mask": None, "values": plain} | changes
    return encode_with(Plan(**chosen), np.arange(24).reshape(4, 6) % 3, 3, riders=b"", lanes=2)


def test_work_beyond_what_the_bytes_allow_is_refused():
    data = some_stream()
    with pytest.raises(EdgeFormatError, match="steps"):
        context_decode(ByteReader(data), (4, 10 * steps_allowed(len(data))), 3, riders=0)
    assert steps_allowed(2 * 40) == 2 * steps_allowed(40)  # many small tensors may ask for no more than a large one
    values = Pass(64, Contexts(0, 0, 1, 1, 1))
    assert steps((10, 65), 32, Plan((10, 1, 1), 0, 0, values, values)) == 60


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, 16, "flags"),
        (1, 0, "planes"),
        (1, 4, "planes"),
        (3, 3, "at most 2"),
        (4, 0x31, "known kind"),
        (4, 0x02, "known kind"),
        (5, 0, "known kind"),
        (5, 65, "known kind"),
        (6, 0, "known kind"),
        (8, 0, "known kind"),
        (9, 11, "states"),
    ],
)
def test_heads_that_make_no_sense_are_refused(place, value, reason):
    data = bytearray(some_stream())
    data[place] = value
    with pytest.raises(EdgeFormatError, match=reason):
        context_decode(ByteReader(bytes(data)), (4, 6), 3, riders=0)


def test_every_damage_is_found_or_gives_codes_of_the_alphabet():
    data = some_stream()
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            try:
                codes, _ = context_decode(ByteReader(bytes(damaged)), (4, 6), 3, riders=0)
            except EdgeFormatError:
                continue
            assert codes.min() >= 0
            assert codes.max() < 3
