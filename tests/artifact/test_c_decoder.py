import random
import re
import struct
import zlib
from pathlib import Path

import c_decoder as c
import numpy as np
import pytest
from fuzzer import golden_files, mutant, take_apart

import lightning_edge
from lightning_edge.artifact import pack
from lightning_edge.artifact.format import INDEX, META, TENSORS, VERSION, join_sections, section_data, split_sections
from lightning_edge.artifact.tensors import CODECS, DTYPES, decode_tensor, encode_tensor, read_record
from lightning_edge.functional.bytestream import EdgeFormatError, varint
from lightning_edge.functional.coding import CODERS, encode_symbols
from lightning_edge.functional.context_coding import Pass, Plan, encode_with
from lightning_edge.functional.contexts import DIRECTIONS, ENERGY_WEIGHTS, Contexts, geometries
from lightning_edge.functional.huffman import huffman_encode
from lightning_edge.functional.rans import rans_encode

ESCAPES = (14, 30, 62, 126, 254)
NUMBERS = {code: dtype for code, dtype in DTYPES.items() if dtype.kind in "iuf"}
MUTANTS = 2000
pytestmark = pytest.mark.skipif(c.COMPILER is None, reason="no C compiler is there")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return c.compile_program(tmp_path_factory.mktemp("c"), "-O1", *c.SANITIZERS)


def file_of(*records):
    return join_sections({META: b"", INDEX: b"", TENSORS: b"".join(records)})


def record(dtype, shape, codec, payload):
    head = bytes([dtype]) + varint(len(shape)) + b"".join(map(varint, shape)) + bytes([CODECS.index(codec)])
    return head + varint(len(payload)) + payload


def book(values):
    """A codebook whose values are stored as they are."""
    return varint(len(values)) + b"\0" + values.tobytes()


def streams(symbols, alphabet):
    """The same symbols under every coder that can hold them."""
    yield encode_symbols(symbols, alphabet)
    yield b"\1" + huffman_encode(symbols, alphabet)
    yield b"\2" + rans_encode(symbols, alphabet)
    if alphabet <= 256:
        yield b"\3" + symbols.astype(np.uint8).tobytes()


def python_reads(file):
    """What Python makes of the tensors of a file: their bytes, as far as it gets, and whether it gets to the end."""
    tensors = []
    try:
        reader = section_data(file, split_sections(file), TENSORS)
        while reader.left:
            packed = read_record(reader)
            tensors.append((packed.dtype, packed.shape, decode_tensor(packed).tobytes()))
    except EdgeFormatError:
        return tensors, False
    return tensors, True


def claims(file):
    """How many bytes the tensors of a file are said to have, as far as that can be read."""
    size = 0
    try:
        reader = section_data(file, split_sections(file), TENSORS)
        while reader.left:
            packed = read_record(reader)
            size += packed.elements * DTYPES[packed.dtype].itemsize
    except EdgeFormatError:
        return size
    return size


def seen(result):
    tensors, status = result
    return [(tensor.dtype, tensor.shape, tensor.data) for tensor in tensors], status == c.END


def agree(program, files):
    results = [seen(result) for result in c.run(program, files)]
    assert results == [python_reads(file) for file in files]
    assert all(complete for _, complete in results)


def test_every_element_type_and_shape_comes_back(program):
    rng = np.random.default_rng(0)
    files, codecs = [], set()
    for code, dtype in DTYPES.items():
        for shape in ((), (7,), (0,), (3, 0, 2), (8, 3, 3, 3), (1, 1, 1, 1, 1, 9)):
            size = int(np.prod(shape))
            few = rng.integers(0, 256, 3 * dtype.itemsize, dtype=np.uint8).view(dtype)
            if dtype.kind == "b":
                few = np.array([False, True])
            elements = [
                np.resize(few[:1], size),
                rng.choice(few, size),
                np.where(rng.random(size) < 0.9, np.zeros(1, dtype), rng.choice(few, size)).astype(dtype),
                np.arange(size).astype(dtype),
                (rng.normal(size=size) * 3).astype(dtype),
            ]
            encoded = [encode_tensor(flat.reshape(shape), code, adaptive=False) for flat in elements]
            codecs.update(codec for _, codec in encoded)
            files.append(file_of(*(data for data, _ in encoded)))
    agree(program, files)
    assert {"constant", "raw", "half", "planes", "dense", "sparse"} <= codecs


def test_what_the_packer_writes_with_contexts_is_read(program):
    rng = np.random.default_rng(6)
    loud = np.exp(rng.normal(size=(32, 1, 1, 1)))
    weights = (rng.normal(size=(32, 16, 3, 3)) * loud).round().clip(-7, 7)
    encoded = [encode_tensor((weights / 8).astype(np.float32), 1), encode_tensor(weights.astype(np.int8), 3)]
    assert [codec for _, codec in encoded] == ["context"] * 2
    agree(program, [file_of(*(data for data, _ in encoded))])


@pytest.mark.parametrize("alphabet", [2, 17, 256, 257, 1000])
def test_every_coder_of_symbols_is_read_in_dense_and_block_codecs(program, alphabet):
    rng = np.random.default_rng(alphabet)
    files = []
    types = list(NUMBERS.items())
    for size in (1, 2, 333, 4000):
        symbols = np.minimum(rng.geometric(0.4, size) - 1, alphabet - 1)
        for index, coded in enumerate(streams(symbols, alphabet)):
            for code, dtype in types[index::3]:
                values = rng.integers(0, 256, alphabet * dtype.itemsize, dtype=np.uint8).view(dtype)
                files.append(file_of(record(code, (size,), "dense", book(values) + coded)))
            for block in (2, 4):
                values = rng.normal(size=alphabet * block).astype(np.float32)
                payload = bytes([block]) + book(values) + coded
                files.append(file_of(record(1, (size, block), "blocks", payload)))
                wide = rng.integers(-9, 9, alphabet * block)
                files.append(file_of(record(7, (1, size * block), "blocks", bytes([block]) + book(wide) + coded)))
        assert {coded[0] for coded in streams(symbols, alphabet)} <= set(range(len(CODERS)))
    agree(program, files)


def test_streams_of_several_chunks_and_many_lanes_are_read(program):
    rng = np.random.default_rng(1)
    symbols = np.minimum(rng.geometric(0.1, 60_000) - 1, 99)
    numbers = rng.integers(0, 4000, 40_000)
    files = [
        file_of(record(2, (len(part),), "dense", varint(size) + b"\0" + bytes(size) + coder + encode(part, size)))
        for part, size in ((symbols, 100), (numbers, 4000))
        for coder, encode in ((b"\1", huffman_encode), (b"\2", rans_encode))
    ]
    agree(program, files)


@pytest.mark.parametrize("escape", ESCAPES)
def test_gaps_of_every_escape_are_read(program, escape):
    rng = np.random.default_rng(escape)
    files = []
    for live in (0, 1, 40):
        gaps = rng.integers(0, 3 * escape, live)
        symbols = np.array([part for gap in gaps for part in [escape] * (gap // escape) + [gap % escape]], dtype=int)
        count = int(gaps.sum()) + live + int(rng.integers(0, 50))
        for code, dtype in NUMBERS.items():
            values = rng.integers(0, 256, 5 * dtype.itemsize, dtype=np.uint8).view(dtype)
            coded = encode_symbols(symbols, escape + 1)
            head = varint(live) + bytes([escape]) + varint(len(symbols)) + varint(len(coded))
            payload = book(values) + head + coded + encode_symbols(rng.integers(0, 5, live), 5)
            files.append(file_of(record(code, (count,), "sparse", payload)))
    agree(program, files)


def test_halves_and_consecutive_numbers_become_the_same_values(program):
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[~np.isnan(halves.view(np.float16))]
    files = [file_of(record(1, (len(halves),), "half", halves.astype("<u2").tobytes()))]
    symbols = encode_symbols(np.arange(300), 300)
    for code, dtype in NUMBERS.items():
        if dtype.kind != "f":
            first = np.array([-3]).astype(dtype)  # wraps around
            files.append(file_of(record(code, (300,), "dense", varint(300) + b"\2" + first.tobytes() + symbols)))
    files.append(file_of(record(1, (300,), "dense", varint(300) + b"\1" + halves[:300].tobytes() + symbols)))
    agree(program, files)


def random_plan(rng, shape, alphabet):
    def some(directions):
        weighting, energies = int(rng.integers(len(ENERGY_WEIGHTS))), int(rng.integers(1, 9))
        return Pass(
            int(rng.integers(1, 300)), Contexts(weighting, 900, int(rng.integers(1, 300)), energies, directions)
        )

    geometry = geometries(shape)[int(rng.integers(len(geometries(shape))))]
    mask = some(0) if rng.random() < 0.5 else None
    values = some(int(rng.choice(list(DIRECTIONS))))
    least = max(0, (alphabet - 1).bit_length() - 8)
    return Plan(geometry, int(rng.integers(alphabet)), int(rng.integers(least, 8)), mask, values)


def test_contexts_of_every_kind_are_read(program):
    rng = np.random.default_rng(2)
    files, plans = [], []
    shapes = ((2, 3), (16, 3, 3, 3), (5, 2, 7, 5), (40, 64), (33, 4, 9), (1, 50), (300, 1), (8, 36), (3, 2, 4, 3, 5))
    for index in range(72):
        shape, alphabet = shapes[index % len(shapes)], int(rng.choice([2, 3, 16, 40, 250, 256, 700]))
        codes = rng.normal(alphabet / 2, alphabet / 6, shape).round().clip(0, alphabet - 1).astype(np.int64)
        plan = random_plan(rng, shape, alphabet)
        codes[rng.random(shape) < 0.5] = plan.zero
        code, dtype = list(NUMBERS.items())[index % len(NUMBERS)]
        if dtype.itemsize == 1 and alphabet > 256:
            code, dtype = 4, NUMBERS[4]
        values = rng.integers(0, 256, alphabet * dtype.itemsize, dtype=np.uint8)
        rows = codes.reshape(shape[0], -1)
        lanes = 1 << int(rng.integers(0 if codes.size < 100 else 4, 8))  # a state each takes too many steps
        coded = encode_with(plan, rows, alphabet, riders=values.tobytes(), lanes=lanes)
        files.append(file_of(record(code, shape, "context", varint(alphabet) + b"\0" + coded)))
        plans.append(plan)
    agree(program, files)
    assert {plan.values.contexts.directions for plan in plans} == set(DIRECTIONS)
    assert {plan.mask is None for plan in plans} == {True, False}
    assert len({plan.shift for plan in plans}) == 8


def test_counts_that_become_large_are_halved_as_in_python(program):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, (40, 1000))
    one = Pass(40, Contexts(0, 0, 1, 1, 1))
    wide = rng.integers(0, 3, (16_000, 3))  # a column brings more than a table holds
    files = []
    for rows in (codes, wide):
        plan = Plan((rows.shape[1], 1, 1), 1, 0, None, one)
        coded = encode_with(plan, rows, 3, riders=b"", lanes=256)
        files.append(file_of(record(3, rows.shape, "context", b"\3\2\xff" + coded)))
    agree(program, files)


def small_files():
    """One small file for each codec, each coder and each kind of pass."""
    rng = np.random.default_rng(4)
    live = np.where(rng.random(400) < 0.1, rng.integers(1, 4, 400), 0).astype(np.int8)
    symbols = np.minimum(rng.geometric(0.5, 80) - 1, 5)
    values = rng.normal(size=6).astype(np.float32)
    pair = rng.normal(size=12).astype(np.float32)
    yield record(1, (2, 3), "constant", bytes(4))
    yield record(5, (2, 3), "raw", bytes(range(12)))
    yield record(1, (5,), "half", bytes(range(10)))
    yield record(4, (80,), "planes", b"".join(varint(len(s)) + s for s in list(streams(symbols, 256))[2:4]))
    for coded in streams(symbols, 6):
        yield record(1, (8, 10), "dense", book(values) + coded)
        yield record(1, (80, 2), "blocks", b"\2" + book(pair) + coded)
    yield record(3, (2, 40), "dense", b"\6\2\xfe" + encode_symbols(symbols, 6))
    gaps = encode_symbols(np.array([14, 3, 0, 0, 1]), 15)
    yield record(1, (40,), "sparse", book(values) + b"\4\x0e\5" + varint(len(gaps)) + gaps + b"\0\2")
    yield encode_tensor(live, 3)[0]
    for index in range(12):
        shape = ((6, 2, 3, 3), (12, 10))[index % 2]
        codes = rng.integers(0, 5, shape)
        plan = random_plan(rng, shape, 5)
        coded = encode_with(plan, codes.reshape(shape[0], -1), 5, riders=values[:5].tobytes(), lanes=1 << index % 4)
        yield record(1, shape, "context", varint(5) + b"\0" + coded)


def test_a_file_that_ends_early_is_damaged_at_every_byte(program):
    file = file_of(*small_files())
    results = c.run(program, [file[:size] for size in range(len(file))])
    assert all(status in (c.NO_EDGE, c.DAMAGED) for _, status in results)
    cut = [data[:size] for data in small_files() for size in range(1, len(data))]
    results = [seen(result) for result in c.run(program, [file_of(data) for data in cut])]
    assert results == [python_reads(file_of(data)) for data in cut]
    assert not any(complete for _, complete in results)


def test_a_flipped_bit_does_not_match_the_checksum(program):
    file = file_of(*list(small_files())[4:8])
    flipped = []
    for bit in range(0, 8 * len(file), 7):
        damaged = bytearray(file)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(damaged))
    statuses = {status for _, status in c.run(program, flipped)}
    assert {c.NO_EDGE, c.VERSION, c.CHECKSUM} <= statuses <= {c.NO_EDGE, c.VERSION, c.CHECKSUM, c.DAMAGED}


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice([0, 1, 2, 127, 128, 255])
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 4))
        else:
            del data[place : place + rng.randrange(1, 4)]
    return bytes(data)


def test_what_c_reads_of_a_mutated_file_python_reads_too(program):
    rng = random.Random(5)
    kinds = list(small_files())
    files = [file_of(mutated(rng.choice(kinds), rng)) for _ in range(900)]
    assert all(len(file) < 2000 for file in files)
    results = [seen(result) for result in c.run(program, files)]
    complete = [(mine, python_reads(file)) for mine, file in zip(results, files, strict=True) if mine[1]]
    assert all(mine == theirs for mine, theirs in complete)
    assert 50 < len(complete) < 600


def test_what_is_hard_to_hit_by_chance_is_refused_too(program):
    rng = np.random.default_rng(7)
    coded = huffman_encode(rng.integers(0, 4, 20_000), 4)  # two codes of 10,000 symbols: 20,000 bits each
    assert coded[2:6] == b"\2" + varint(20_000)
    moved = coded[:3] + varint(19_998) + coded[6:]
    plan = Plan((10, 1, 1), 4, 3, None, Pass(40, Contexts(0, 0, 1, 1, 1)))
    right = encode_with(plan, rng.integers(0, 64, (24, 10)), 64, riders=b"", lanes=1)
    place = right.index(varint(90)) + 1  # 240 lower bits of 3: 90 bytes
    longer = right[: place - 1] + varint(91) + right[place : place + 90] + b"\0" + right[place + 90 :]
    head = b"\x40\2\0"  # 64 consecutive numbers
    hostile = [
        record(2, (20_000,), "dense", b"\4\2\0\1" + moved),
        record(2, (24, 10), "context", head + longer),
        record(1, (0, 1 << 30), "raw", b""),
        record(2, (1 << 16, 1 << 15), "constant", b"\0"),
        record(1, (1,), "half", b"\x01\x7c"),
        record(3, (2, 2), "context", varint(257) + b"\0" + bytes(40)),
        record(17, (1,), "constant", b"\0"),
        record(2, (1,), "constant", b"\0").replace(b"\0\1", b"\x08\1"),
    ]
    assert [result for result, _ in map(seen, c.run(program, [file_of(data) for data in hostile]))] == [[]] * 8
    fine = [record(2, (20_000,), "dense", b"\4\2\0\1" + coded), record(2, (24, 10), "context", head + right)]
    agree(program, [file_of(data) for data in fine])


def test_golden_files_of_this_version_are_read(program):
    files = [file for file in golden_files() if file[4] == VERSION]
    assert len(files) > 3
    agree(program, files)


def test_what_c_reads_of_the_fuzzers_files_python_reads_too(program):
    rng = random.Random(6)
    originals = [take_apart(file) for file in golden_files() if file[4] == VERSION]
    # What claims much memory takes long to clear under a sanitizer; limits have tests of their own.
    files = [file for _, file in (mutant(rng, originals) for _ in range(MUTANTS)) if claims(file) < 1 << 20]
    results = [seen(result) for result in c.run(program, files)]
    complete = [(mine, python_reads(file)) for mine, file in zip(results, files, strict=True) if mine[1]]
    assert all(mine == theirs for mine, theirs in complete)
    assert 50 < len(complete) < len(files) > 1500


def test_a_hostile_header_is_refused(program):
    entry = struct.pack("<BII", TENSORS, 0, 0)

    def header(*entries, count=None, more=b""):
        data = b"EDGE\2" + bytes([len(entries) if count is None else count]) + b"".join(entries)
        return data + struct.pack("<I", zlib.crc32(data)) + more

    files = [
        b"",
        header(),
        header(entry, entry),
        header(struct.pack("<BII", TENSORS, 0xFFFFFFFF, 0)),
        header(struct.pack("<BII", META, 0xFFFFFFFF, 0), entry),
        header(entry, count=255),
        header(entry, more=b"!"),
        header(entry),
    ]
    statuses = [status for _, status in c.run(program, files)]
    assert statuses == [c.NO_EDGE, *[c.DAMAGED] * 6, c.END]


def test_small_streams_take_a_small_workspace(program):
    symbols = np.arange(4000) % 16
    files = [file_of(record(2, (4000,), "dense", b"\x10\2\0" + coded)) for coded in streams(symbols, 16)]
    assert max(tensors[0].workspace_size for tensors, _ in c.run(program, files)) < 2048


def rows_of(text, start):
    """The bytes in the first column of the table that follows ``start`` in a text, in hexadecimal."""
    table = re.search(r"\n\n(\|.*?)\n(?!\|)", text[text.index(start) :] + "\n", re.DOTALL).group(1)
    return "".join(re.findall(r"[0-9a-f]{2}", "".join(line.split("|")[1] for line in table.splitlines()[2:])))


def test_the_example_of_the_specification_is_what_is_packed(program, monkeypatch):
    text = (c.SOURCES.parent / "FORMAT.md").read_text()
    monkeypatch.setattr(lightning_edge, "__version__", "0.1.0")
    w = np.array([[0, 0.5, 0, 0, -0.5, 0, 0, 0.5], [0, 0, 0, 0.5, 0, 0, -0.5, 0]], np.float32)
    pack({"b": np.zeros(3, np.float32), "w": w}, "example.edge")
    packed = Path("example.edge").read_bytes()
    assert len(packed) == 85
    assert packed.hex() == rows_of(text, "## An example")
    context = bytes.fromhex(rows_of(text, 'The same "w"'))
    assert len(context) == 29
    file = file_of(record(1, (2, 8), "context", context))
    assert c.run(program, [packed, file])[1][0][0].data == w.tobytes()
    agree(program, [packed, file])


def test_the_decoder_stays_short_and_depends_on_nothing():
    lines, known = {}, {"<stddef.h>", "<stdint.h>", "<string.h>", '"edge_decode.h"'}
    for name in ("edge_decode.h", "edge_decode.c"):
        text = (c.SOURCES / name).read_text()
        assert set(re.findall(r'#include ([<"].*[>"])', text)) <= known
        assert max(map(len, text.splitlines())) <= 120
        code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        lines[name] = len(text.splitlines())
        assert not {"malloc", "calloc", "alloca", "free", "goto"} & set(re.findall(r"\w+", code))
    assert lines == {"edge_decode.h": 80, "edge_decode.c": 549}  # comments and empty lines too: a change is to be seen
