"""Speed of `.edge` files, one thread: symbols packed and decoded per second, numpy and C; seconds to a session.

Run: OMP_NUM_THREADS=1 python benchmarks/decode_speed.py
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import markdown, write_section

from lightning_edge import pack
from lightning_edge.artifact import load_artifact, read_tensors
from lightning_edge.artifact.format import INDEX, META, TENSORS, join_sections
from lightning_edge.artifact.tensors import CODECS
from lightning_edge.export.onnx import to_onnx
from lightning_edge.functional.bytestream import ByteReader, varint
from lightning_edge.functional.huffman import huffman_decode, huffman_encode
from lightning_edge.functional.rans import rans_decode, rans_encode
from lightning_edge.functional.sharing import kmeans_1d
from lightning_edge.models.lenet import LeNet5, LeNet300
from lightning_edge.models.resnet import ResNet20
from lightning_edge.surgery.sharing import share_weights_

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "artifact"))
from c_decoder import COMPILER, compile_program, seconds

SYMBOLS, ALPHABET, REPEATS = 16_000_000, 64, 3
Coder = tuple[int, Callable[..., bytes], Callable[..., NDArray[np.int64]]]
CODERS: dict[str, Coder] = {"Huffman": (1, huffman_encode, huffman_decode), "rANS": (2, rans_encode, rans_decode)}


def geometric(bits: float) -> NDArray[np.float64]:
    """Return probabilities that fall by the same factor from symbol to symbol, of this entropy."""
    low, high = 1e-6, 1 - 1e-6
    for _ in range(60):
        factor = (low + high) / 2
        share = factor ** np.arange(ALPHABET)
        share /= share.sum()
        low, high = (factor, high) if -(share * np.log2(share)).sum() < bits else (low, factor)
    return share


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the fewest seconds of some runs, and what the last returned."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - start)
    return min(taken), result


def file_of(stream: bytes, count: int) -> bytes:
    """Return a file of one tensor of uint8, whose values are the symbols of a stream."""
    payload = varint(ALPHABET) + bytes([2, 0]) + stream
    head = bytes([2, 1]) + varint(count) + bytes([CODECS.index("dense")]) + varint(len(payload))
    return join_sections({META: b"", INDEX: b"", TENSORS: head + payload})


def million(count: int, taken: float) -> str:
    """Return a rate in millions per second."""
    return f"{count / taken / 1e6:.0f}"


def static_rows(program: Path) -> list[dict[str, object]]:
    """Measure both coders with static tables."""
    rows: list[dict[str, object]] = []
    for bits in (1, 2, 4):
        symbols = np.random.default_rng(bits).choice(ALPHABET, size=SYMBOLS, p=geometric(bits))
        for name, (coder, encode, decode) in CODERS.items():
            packing, stream = timed(lambda encode=encode, symbols=symbols: encode(symbols, ALPHABET))
            reading, back = timed(lambda decode=decode, stream=stream: decode(ByteReader(stream), SYMBOLS, ALPHABET))
            if not np.array_equal(back, symbols):
                raise RuntimeError(f"{name} must give back every symbol")
            in_c = seconds(program, file_of(bytes([coder]) + stream, SYMBOLS), repeats=REPEATS)
            rows.append(
                {
                    "entropy, bits": bits,
                    "coder": name,
                    "bits per symbol": f"{8 * len(stream) / SYMBOLS:.3f}",
                    "packed, numpy": million(SYMBOLS, packing),
                    "decoded, numpy": million(SYMBOLS, reading),
                    "decoded, C": million(SYMBOLS, in_c),
                }
            )
    return rows


def shared_weights(clusters: int) -> dict[str, NDArray[np.float32]]:
    """Return the weights of a ResNet-20, as they are before training, shared tensor by tensor.

    Rows and kernels are made to differ in energy as trained ones do, or contexts would find nothing and not be chosen.
    """
    torch.manual_seed(0)
    shared = {}
    for name, weight in ResNet20().state_dict().items():
        if weight.ndim < 2:
            continue
        loud = torch.randn(weight.shape[0], *[1] * (weight.ndim - 1)).mul(0.5).exp()
        if weight.ndim == 4:
            loud = loud * torch.randn(*weight.shape[:2], 1, 1).mul(0.5).exp()
        centroids, codes = kmeans_1d((weight * loud).reshape(-1), clusters, init="linear")
        shared[name] = centroids[codes.long()].reshape(weight.shape).numpy()
    return shared


def adaptive_rows(program: Path, folder: Path) -> list[dict[str, object]]:
    """Measure the codec of adaptive contexts on tensors of ResNet-20's size."""
    rows: list[dict[str, object]] = []
    for clusters in (16, 32):
        tensors = shared_weights(clusters)
        path = folder / f"shared{clusters}.edge"
        packing, report = timed(lambda tensors=tensors, path=path: pack(tensors, path))
        reading, back = timed(lambda path=path: read_tensors(path))
        if not all(np.array_equal(back[name], tensor) for name, tensor in tensors.items()):
            raise RuntimeError("every tensor must come back")
        weights = sum(tensor.size for tensor in tensors.values())
        in_context = sum(tensors[row.name].size for row in report.tensors if row.codec == "context")
        rows.append(
            {
                "values per tensor": clusters,
                "weights": f"{weights:,}",
                "of these under contexts": f"{in_context:,}",
                "bytes": f"{report.size_bytes:,}",
                "packed, numpy": f"{packing:.2f} s",
                "read, numpy": f"{reading:.2f} s",
                "decoded, C, million weights/s": million(weights, seconds(program, path.read_bytes(), repeats=10)),
            }
        )
    return rows


def session_rows(folder: Path) -> list[dict[str, object]]:
    """Measure the time from a file to a session that is ready, imports aside."""
    rows: list[dict[str, object]] = []
    for network, shape in ((LeNet300(), (1, 1, 28, 28)), (LeNet5(), (1, 1, 28, 28)), (ResNet20(), (1, 3, 32, 32))):
        share_weights_(network.eval(), clusters=16)
        model = to_onnx(network, (torch.zeros(shape),))
        for adaptive in (True, False):
            path = folder / "session.edge"
            report = pack(model, path, adaptive=adaptive)
            rows.append(
                {
                    "network": type(network).__name__,
                    "bytes": f"{report.size_bytes:,}",
                    "tensors under contexts": sum(row.codec == "context" for row in report.tensors),
                    "file to session": f"{1000 * timed(lambda path=path: load_artifact(path))[0]:.0f} ms",
                }
            )
    return rows


def main() -> None:
    """Measure, and write the section."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = compile_program(folder, "-O2")
        tables = [static_rows(program), adaptive_rows(program, folder), session_rows(folder)]
    texts = [
        f"{SYMBOLS:,} symbols of an alphabet of {ALPHABET}, static tables; million symbols per second.",
        "Adaptive contexts: the weights of a ResNet-20, shared tensor by tensor, rows and kernels of differing energy. "
        "Where a mask is coded first a weight has two symbols; weights are counted.",
        "Networks shared to 16 values, dense, untrained; with adaptive contexts and without.",
    ]
    parts = [f"{text}\n\n{markdown(table)}" for text, table in zip(texts, tables, strict=True)]
    note = f"One thread; fewest seconds of {REPEATS} runs; C by `{Path(COMPILER or 'cc').name} -O2`, checksums aside."
    command = "OMP_NUM_THREADS=1 python benchmarks/decode_speed.py"
    write_section("Speed of the .edge file", command=command, body="\n\n".join([note, *parts]))


if __name__ == "__main__":
    main()
