"""Files that earlier versions wrote: every later version must read them bit by bit, inspect and run them."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from make_golden import FILES, network
from onnx import numpy_helper

from lightning_edge import load_artifact, pack
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.artifact.format import VERSION
from lightning_edge.artifact.reading import onnx_bytes
from lightning_edge.artifact.tensors import CODECS
from lightning_edge.functional.coding import CODERS

GOLDEN = Path(__file__).with_name("golden")
VERSIONS = sorted(folder.name for folder in GOLDEN.iterdir())
EDGE_FILES = sorted(GOLDEN.glob("*/*.edge"))


def bits(tensors):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()}


def named(path):
    return f"{path.parent.name}-{path.stem}"


def test_every_version_has_its_files():
    assert f"version{VERSION}" in VERSIONS
    assert len(EDGE_FILES) == len(VERSIONS) * (len(FILES) + 1)


@pytest.mark.parametrize("path", EDGE_FILES, ids=named)
def test_every_tensor_is_read_bit_by_bit(path):
    with np.load(path.with_suffix(".npz")) as expected:
        found = read_tensors(path)
        if path.stem == "network":  # whose smallest tensors are inside of its graph
            model = onnx.load_from_string(onnx_bytes(path))
            found = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        assert bits(found) == bits(expected)


@pytest.mark.parametrize("path", EDGE_FILES, ids=named)
def test_what_an_inspection_says_stays_the_same(path):
    rows = json.loads(path.with_suffix(".json").read_text())
    found = inspect(path)
    assert len(rows) == len(found.tensors)
    for row, info in zip(rows, found.tensors, strict=True):
        for field in ("bits_per_weight", "entropy_bits", "lane_bytes"):
            assert getattr(info, field) == pytest.approx(row.pop(field), abs=1e-9)
        assert {name: getattr(info, name) for name in row} == row | {"shape": tuple(row["shape"])}
    assert found.totals[-1].size_bytes == path.stat().st_size
    assert sum(part.size_bytes for part in found.totals[:-1]) == path.stat().st_size


@pytest.mark.parametrize("version", VERSIONS)
def test_the_network_gives_the_outputs_that_it_gave(version):
    folder = GOLDEN / version
    with np.load(folder / "network_calls.npz") as calls:
        logits = load_artifact(folder / "network.edge")(calls["image"])
        np.testing.assert_allclose(logits, calls["logits"], rtol=1e-4, atol=1e-5)  # runtimes add up in other orders


def test_the_files_hold_every_codec_and_every_coder():
    rows = [row for path in EDGE_FILES for row in inspect(path).tensors]
    assert {row.codec for row in rows} == set(CODECS)
    assert {coder for row in rows for coder in row.coder.split("+")} == {*CODERS, "adaptive", ""}
    assert {row.codec for row in rows if row.name.split(".")[0] == row.codec} == set(CODECS) - {"context"}
    assert {row.codec for path in EDGE_FILES if path.stem == "contexts" for row in inspect(path).tensors} == {"context"}


@pytest.mark.parametrize("name", FILES)
def test_packing_the_same_tensors_takes_no_more_bytes(name, tmp_path):
    folder = GOLDEN / f"version{VERSION}"
    with np.load(folder / f"{name}.npz") as tensors:
        again = pack(dict(tensors), tmp_path / "again.edge", recipe_hash="golden")
    assert again.size_bytes <= (folder / f"{name}.edge").stat().st_size


def test_packing_the_same_network_takes_no_more_bytes(tmp_path):
    size = (GOLDEN / f"version{VERSION}" / "network.edge").stat().st_size
    assert pack(network(), tmp_path / "again.edge").size_bytes <= size
