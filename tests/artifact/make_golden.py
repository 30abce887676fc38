"""Writes the golden files: small packed files, and beside each what a reader must find in it.

Run once for each version of the format, from the checkout: python tests/artifact/make_golden.py
Files of versions that were published are never written again; a new version gets a folder of its own.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lightning_edge.artifact import inspect, load_artifact, pack
from lightning_edge.artifact.format import VERSION

GOLDEN = Path(__file__).with_name("golden")
Array = NDArray[np.generic]


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return kernels whose neighbours are alike and whose rows differ in energy, in whole numbers."""
    rough = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    for axis in range(2, len(shape)):
        rough = rough + np.roll(rough, 1, axis)
    return np.clip(np.round(3 * rough), -40, 40).astype(np.float32)


def codecs() -> dict[str, Array]:
    """Return a tensor for each codec but contexts, each coder of symbols and each size of alphabet."""
    rng = np.random.default_rng(0)
    runs = np.zeros(1500, np.float32)
    runs[600:900] = np.where(rng.random(300) < 0.5, 0, rng.integers(1, 9, 300) / 7)
    ternary = np.zeros(2000, np.float32)
    ternary[rng.integers(900, 1100, 60)] = 0.25
    pairs = np.float32([[0.5, -1.25], [2.0, 3.5], [-0.75, 0.3]])
    fours = rng.integers(-100, 100, (3, 4)).astype(np.int16)
    return {
        "constant": np.full((3, 50), -0.0, np.float32),
        "raw": rng.normal(size=(4, 5)).astype(np.float32),
        "half": rng.normal(size=20).astype(np.float16).astype(np.float32),
        "planes.float32": rng.normal(size=150).astype(np.float32),
        "planes.int64": np.arange(900, dtype=np.int64) // 3,
        "dense.huffman": rng.integers(0, 4, 300).astype(np.int8),
        "dense.rans": (rng.random(400) < 0.1).astype(np.uint8) + (rng.random(400) < 0.05),
        "dense.rans.lanes": rng.binomial(20, 0.5, 4000).astype(np.int16),
        "dense.bytes": rng.permutation(np.tile(rng.normal(size=200), 2)).astype(np.float32),
        "dense.wide": rng.permutation(np.tile(rng.normal(size=270), 4)).astype(np.float32),
        "sparse": runs,
        "sparse.one": ternary,
        "blocks.2": pairs[rng.integers(0, 3, (20, 8))].reshape(20, 16),
        "blocks.4": fours[rng.integers(0, 3, (16, 6))].reshape(16, 24),
    }


def contexts() -> dict[str, Array]:
    """Return tensors whose codes are coded under contexts: masked and not, with lower bits, many and few rows."""
    rng = np.random.default_rng(1)
    kernels = smooth(rng, (24, 4, 3, 3))
    density = rng.random((24, 1)) ** 2
    matrix = smooth(rng, (24, 8, 4, 4)).reshape(24, 128)
    return {
        "whole": (kernels / 3).astype(np.float32),
        "masked": np.where(rng.random((24, 128)) < density, np.clip(matrix, -4, 4) / 7, 0).astype(np.float32),
        "integers": np.round(rng.normal(size=(32, 40)) * np.geomspace(0.2, 9, 32)[:, None]).astype(np.int8),
        "halves": (smooth(rng, (8, 2, 5, 5)) / 4).astype(np.float32),
        "signal": np.round(rng.normal(size=(16, 6, 9)) * np.geomspace(0.2, 5, 16)[:, None, None]) / 3,
    }


def types() -> dict[str, Array]:
    """Return a tensor of any bits for each element type, scalars, tensors without elements, and zeros of both signs."""
    rng = np.random.default_rng(2)
    kinds = ["<f4", "u1", "i1", "<u2", "<i2", "<i4", "<i8", "<f2", "<f8", "<u4", "<u8"]
    tensors: dict[str, Array] = {kind.lstrip("<"): np.frombuffer(rng.bytes(48), kind) for kind in kinds}
    nans = np.array([0x7F800001, 0xFFC12345, 0x7FC00000, 0x80000000, 0], np.uint32).view(np.float32)
    return tensors | {
        "bfloat16": np.frombuffer(rng.bytes(48), "<u2"),
        "bool": rng.random((3, 7)) < 0.5,
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 3), np.int64),
        "not a number": np.tile(nans, 20).reshape(10, 10),
        "größe": np.ones((1,) * 9, np.int8),
    }


def network() -> ModelProto:
    """Return a pruned, shared convolution and an int8 linear layer behind it."""
    rng = np.random.default_rng(3)
    filters = np.where(rng.random((8, 2, 3, 3)) < 0.4, rng.integers(-3, 4, (8, 2, 3, 3)) / 7, 0)
    tensors = {
        "conv.weight": filters.astype(np.float32),
        "conv.bias": rng.normal(size=8).astype(np.float32),
        "codes": np.clip(rng.normal(scale=30, size=(10, 72)).round(), -127, 127).astype(np.int8),
        "scales": (rng.random(10) / 50).astype(np.float32),
        "zeros": np.zeros(10, np.int8),
    }
    nodes = [
        helper.make_node("Conv", ["image", "conv.weight", "conv.bias"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["live"]),
        helper.make_node("Flatten", ["live"], ["features"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["weight"], axis=0),
        helper.make_node("Gemm", ["features", "weight"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, 5, 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


FILES: dict[str, Callable[[], dict[str, Array]]] = {
    "codecs": codecs,
    "contexts": contexts,
    "types": types,
    "empty": dict,
}


def main() -> None:
    """Write every file of this version."""
    folder = GOLDEN / f"version{VERSION}"
    folder.mkdir(parents=True)
    for name, make in FILES.items():
        tensors = make()
        brains = {
            key: torch.from_numpy(tensors[key].copy()).view(torch.bfloat16) for key in tensors if key == "bfloat16"
        }
        pack(tensors | brains, folder / f"{name}.edge", recipe_hash="golden")
        np.savez_compressed(folder / f"{name}.npz", **tensors)
    model = network()
    pack(model, folder / "network.edge")
    np.savez_compressed(
        folder / "network.npz", **{item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    )
    image = np.random.default_rng(4).normal(size=(3, 2, 5, 5)).astype(np.float32)
    np.savez_compressed(folder / "network_calls.npz", image=image, logits=load_artifact(folder / "network.edge")(image))
    for path in sorted(folder.glob("*.edge")):
        found = inspect(path)
        path.with_suffix(".json").write_text(json.dumps(asdict(found)["tensors"], indent=1, ensure_ascii=False) + "\n")
        print(path.name, path.stat().st_size, *found.tensors, sep="\n  ")


if __name__ == "__main__":
    main()
