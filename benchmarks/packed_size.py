"""Size without loss: whole `.edge` files beside `zstd -19`, `xz -9e` and nncodec (ISO/IEC 15938-17) on the same codes.

The others code what our file holds, tensor by tensor, and are given our graph section and header; see ``NOTES``.

Run: python benchmarks/packed_size.py --resnet20 resnet20-12fca82f.th --pruned-resnet20 pruned/last.ckpt \
    --lenet300 lenet300/last.ckpt --dense-lenet300 lenet300/baseline.ckpt --lenet5 lenet5/last.ckpt \
    --dense-lenet5 lenet5/baseline.ckpt --nncodec-python nncodec/bin/python

nncodec 2.1.3 (PyPI) needs an environment of its own with torch, pandas, scikit-learn, tqdm and h5py; what else its
package imports (torchvision, cv2) is not used to code tensors and is replaced by empty modules.
"""

import argparse
import json
import lzma
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from results import markdown, write_section
from torch import nn

from lightning_edge import export, prune_, share_weights_
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.models.lenet import LeNet5, LeNet300
from lightning_edge.models.resnet import ResNet20
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.deadunits import remove_dead_units_
from lightning_edge.surgery.quantization import capture_

Arrays = dict[str, NDArray[Any]]
MNIST, CIFAR = torch.zeros(2, 1, 28, 28), torch.zeros(2, 3, 32, 32)
PRUNED_BARS, DENSE_BAR = (0.95, 0.80), 1.01
"""Most bytes of ours to nncodec's, and to the better of xz's and zstd's; for dense ones, to the smallest of all."""
NNCODEC = """
import json, sys
from unittest.mock import MagicMock

for name in ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms", "cv2"):
    sys.modules[name] = MagicMock()
import numpy as np
from nncodec import nnc

settings = {"qp": 0, "nonweight_qp": 0, "use_dq": False, "bitstream_path": None, "return_bitstream": True}
cases = {}
for key, array in np.load(sys.argv[1]).items():
    case, tensor = key.split("/")
    cases.setdefault(case, {})[tensor] = array
sizes = {}
for case, tensors in cases.items():
    streams = [
        nnc.compress(dict(tensors), row_skipping=skipping, cabac_unary_length_minus1=unary, **settings)
        for skipping in (True, False)
        for unary in (2, 10, 20)
    ]
    for stream in streams:
        back = nnc.decompress(stream)
        assert all(np.array_equal(back[name], tensor) for name, tensor in tensors.items()), case
    sizes[case] = min(map(len, streams))
print("\\n" + json.dumps(sizes))
"""
"""What runs where nncodec is installed: arrays of int32 in, bytes out, every stream decoded and compared."""
NOTES = """Total bytes of a file. The LeNets said to be trained are runs of Deep Compression on MNIST; nothing was
trained after one-shot pruning, or after sharing a ResNet-20: only sizes mean something there. The others code what our
file without the removal of dead units holds:

- the codes of each weight tensor, ordered by value, 0 for the value nearest to zero. nncodec has them as int32, each
  tensor under a name of one or two characters, with `qp=0, nonweight_qp=0, use_dq=False`, the smallest with
  `row_skipping` on or off and `cabac_unary_length_minus1` 2, 10 (its default) or 20, each decoded and compared. xz
  (without checksum) and zstd have all tensors in one stream, the smaller of a byte per code and of two codes per byte
  where a tensor has at most 16 values;
- all other tensors and the shared values, float16 where our file holds float16, in one stream: the smallest of raw,
  zstd -19 and xz -9e, as they are and by byte planes; or coded together with the codes, where that is smaller;
- our graph section, names and header as they are; nothing for shapes."""


@dataclass(frozen=True)
class Case:
    """A network to pack: what it is called, what it is called with, and whether it is pruned."""

    title: str
    network: nn.Module
    example: torch.Tensor
    pruned: bool


@dataclass(frozen=True)
class Peers:
    """What the others are given: codes of the weights, bytes of all else that they must hold, and of what they share.

    ``container_bytes`` are those of our file beside its tensors.
    """

    codes: Arrays
    small: Arrays
    container_bytes: int


def loaded(network: nn.Module, path: Path) -> nn.Module:
    """Return the network with the weights of a checkpoint, whatever prefix their names have."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    for prefix in ("module.", "network."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    network.load_state_dict(state)
    return network.eval()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the networks, each of its own."""
    lenets = (
        ("LeNet-300-100", LeNet300, 0.98, arguments.lenet300, arguments.dense_lenet300),
        ("LeNet-5", LeNet5, 0.99, arguments.lenet5, arguments.dense_lenet5),
    )
    for title, kind, _, path, _ in lenets:
        network = loaded(kind(), path)
        yield Case(f"{title}, {zeros(network):.0%} zero, trained, 32 values", network, MNIST, pruned=True)
    for title, kind, sparsity, _, path in lenets:
        network = loaded(kind(), path)
        prune_(network, sparsity=sparsity)
        share_weights_(network, clusters=15)
        yield Case(f"{title}, {sparsity:.0%} zero, one shot, 15 values", network, MNIST, pruned=True)
    network = loaded(ResNet20(), arguments.pruned_resnet20)
    share_weights_(network, clusters=16)
    yield Case(f"ResNet-20, {zeros(network):.0%} zero, 16 values", network, CIFAR, pruned=True)
    for clusters in (16, 32):
        network = loaded(ResNet20(), arguments.resnet20)
        share_weights_(network, clusters=clusters)
        yield Case(f"ResNet-20, dense, {clusters} values", network, CIFAR, pruned=False)
    yield Case("ResNet-20, int8", int8(loaded(ResNet20(), arguments.resnet20)), CIFAR, pruned=False)


def zeros(network: nn.Module) -> float:
    """Return the part of the weights that is zero."""
    weights = [value for value in network.parameters() if value.ndim > 1]
    return 1 - sum(int(value.count_nonzero()) for value in weights) / sum(value.numel() for value in weights)


def int8(network: nn.Module) -> nn.Module:
    """Capture the network and show it some noise: sizes depend little on the ranges of activations."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # observers look while training, batch norms must not change
    capture_(network, (CIFAR,))
    generator = torch.Generator().manual_seed(0)
    network.train()
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(32, *CIFAR.shape[1:], generator=generator))
    return network.eval()


def peers_of(path: Path) -> Peers:
    """Split the tensors of a file into codes and what else is needed to have them back."""
    codes: Arrays = {}
    small: Arrays = {}
    for name, tensor in read_tensors(path).items():
        if tensor.ndim in (2, 4) and tensor.dtype == np.int8:
            codes[name] = tensor.astype(np.int32)
        elif tensor.ndim in (2, 4):
            values, numbers = np.unique(tensor, return_inverse=True)
            if len(values) > 256:
                raise ValueError(f"weights must be shared, at most 256 values, got {len(values)} in {name!r}")
            codes[name] = (numbers.reshape(tensor.shape) - np.abs(values).argmin()).astype(np.int32)
            small[f"{name} values"] = values[values != 0]
        else:
            small[name] = tensor
    contents = inspect(path)
    tensor_bytes = sum(tensor.size_bytes for tensor in contents.tensors)
    return Peers(codes, {name: narrow(array) for name, array in small.items()}, contents.size_bytes - tensor_bytes)


def narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Return float32 numbers as float16 if these hold them all, as our file does."""
    if array.dtype != np.float32:
        return array
    half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def xz(data: bytes) -> int:
    """Return the bytes of `xz -9e` without a checksum."""
    return len(lzma.compress(data, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME))


def zstd(data: bytes) -> int:
    """Return the bytes of `zstd -19` without a checksum or a size."""
    return len(zstandard.ZstdCompressor(level=19, write_content_size=False, write_checksum=False).compress(data))


def code_streams(codes: Arrays) -> Iterator[bytes]:
    """Yield all codes, a byte each; then with two per byte in tensors of at most 16 values."""
    unsigned = [(array - array.min()).astype(np.uint8).reshape(-1) for array in codes.values()]
    yield b"".join(array.tobytes() for array in unsigned)
    packed = []
    for array in unsigned:
        pairs = np.append(array, np.zeros(len(array) % 2, np.uint8))
        packed.append(array if array.max() > 15 else pairs[0::2] << 4 | pairs[1::2])
    yield b"".join(array.tobytes() for array in packed)


def small_streams(small: Arrays) -> Iterator[bytes]:
    """Yield all small tensors as they are, then byte plane by byte plane, those of a width together."""
    yield b"".join(array.tobytes() for array in small.values())
    planes = b""
    for width in (1, 2, 4, 8):
        same = b"".join(array.tobytes() for array in small.values() if array.itemsize == width)
        planes += np.frombuffer(same, np.uint8).reshape(-1, width).T.tobytes()
    yield planes


def nncodec_sizes(given: Sequence[Peers], python: Path | None) -> dict[str, int]:
    """Return the bytes of nncodec's streams, of the codes and of everything, by network; nothing without its python."""
    if python is None:
        return {}
    arrays: Arrays = {}
    for index, peers in enumerate(given):
        for kind, tensors in (("codes", peers.codes), ("all", peers.codes | peers.small)):
            for number, array in enumerate(tensors.values()):
                arrays[f"{kind} {index}/{number}"] = integers(array)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        np.savez(path, **arrays)
        done = subprocess.run([python, "-c", NNCODEC, path], check=True, stdout=subprocess.PIPE, text=True)
    sizes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def integers(array: NDArray[Any]) -> NDArray[np.int32]:
    """Return integers as int32, and floats as the integers that their bits are."""
    same_width = array.view(f"i{array.itemsize}") if array.dtype.kind == "f" else array
    return same_width.astype(np.int32)


def peer_sizes(index: int, peers: Peers, streams: Mapping[str, int]) -> dict[str, int]:
    """Return the total bytes of each of the others."""
    small = min(count(data) for data in small_streams(peers.small) for count in (len, xz, zstd))
    sizes = {}
    if streams:
        sizes["nncodec"] = min(streams[f"codes {index}"] + small, streams[f"all {index}"])
    for name, count in (("xz -9e", xz), ("zstd -19", zstd)):
        apart = min(count(data) for data in code_streams(peers.codes)) + small
        together = min(count(a + b) for a in code_streams(peers.codes) for b in small_streams(peers.small))
        sizes[name] = min(apart, together)
    return {name: size + peers.container_bytes for name, size in sizes.items()}


def row(case: Case, ours: Mapping[str, int], others: Mapping[str, int]) -> dict[str, str]:
    """Return one row of the table."""
    size, peer = ours["alive" if case.pruned else "whole"], others.get("nncodec")
    general = min(others["xz -9e"], others["zstd -19"])
    if case.pruned:
        bounds = {"nncodec": PRUNED_BARS[0] * peer if peer else None, "xz, zstd": PRUNED_BARS[1] * general}
    else:
        bounds = {"the smallest": DENSE_BAR * min(others.values()) if peer else None}
    verdicts = {
        name: "not measured" if bound is None else "met" if size <= bound else "missed"
        for name, bound in bounds.items()
    }
    return {
        "network": case.title,
        "ours": f"{ours['whole']:,}",
        "dead units removed": f"{ours['alive']:,}" if case.pruned else "",
        "nncodec": f"{peer:,}" if peer else "not measured",
        "xz -9e": f"{others['xz -9e']:,}",
        "zstd -19": f"{others['zstd -19']:,}",
        "ours / nncodec": ", ".join(f"{size / peer:.3f}" for size in ours.values()) if peer else "not measured",
        "ours / best of xz and zstd": ", ".join(f"{size / general:.3f}" for size in ours.values()),
        "bar": "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items()),
    }


def measure(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Pack every network, and let the others code the same."""
    found: list[tuple[Case, dict[str, int], Peers]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.edge"
        for case in cases(arguments):
            inputs = (case.example,)
            ours = {"whole": export(case.network, path, example_inputs=inputs).stat().st_size}
            peers = peers_of(path)
            if case.pruned:
                alive = copied(case.network)
                remove_dead_units_(alive, example_inputs=inputs)
                ours["alive"] = export(alive, path, example_inputs=inputs).stat().st_size
            found.append((case, ours, peers))
    streams = nncodec_sizes([peers for _, _, peers in found], arguments.nncodec_python)
    return [row(case, ours, peer_sizes(index, peers, streams)) for index, (case, ours, peers) in enumerate(found)]


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resnet20", type=Path, required=True, help="pretrained ResNet-20")
    parser.add_argument("--pruned-resnet20", type=Path, required=True, help="last.ckpt of a pruning run")
    for name in ("lenet300", "lenet5"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="last.ckpt of deep_compression_mnist.py")
        parser.add_argument(f"--dense-{name}", type=Path, required=True, help="baseline.ckpt of the same run")
    parser.add_argument("--nncodec-python", type=Path, help="interpreter that has nncodec; without, it is left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments)
    complete = sum(all(part.endswith(": met") for part in line["bar"].split("; ")) for line in rows)
    bars = (
        f"The bar: a pruned network, dead units removed, at most {PRUNED_BARS[0]:.0%} of nncodec and"
        f" {PRUNED_BARS[1]:.0%} of the better of xz and zstd; another at most {DENSE_BAR:.0%} of the smallest of the"
        f" three. Met in full in {complete} of {len(rows)} rows. Of two ratios the second is with dead units removed."
    )
    command = (
        "python benchmarks/packed_size.py --resnet20 resnet20-12fca82f.th --pruned-resnet20 resnet20_pruned.ckpt"
        " --lenet300 lenet300.ckpt --dense-lenet300 lenet300_dense.ckpt --lenet5 lenet5.ckpt --dense-lenet5"
        " lenet5_dense.ckpt --nncodec-python nncodec/bin/python"
    )
    write_section("Lossless size", command=command, body="\n\n".join([NOTES, markdown(rows), bars]))


if __name__ == "__main__":
    main()
