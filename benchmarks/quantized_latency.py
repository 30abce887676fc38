"""Latency of int8 ResNet-20 against fp32 in each runtime, and against onnxruntime's own quantization.

Batch 1, one thread, blocks that take turns, the median of the ratios within a block with its 95 % interval. Accuracy is
that of each file in its runtime over all 10,000 test images. All int8 networks are calibrated on the same 512 training
images; the peer is onnxruntime's ``quantize_static`` (QDQ, per channel, uint8 activations, int8 weights), with and
without its own pre-processing. OpenVINO takes part when it is installed.

Run: python benchmarks/quantized_latency.py --data cifar10.npz --weights resnet20-12fca82f.th
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from quantized_resnet20 import EXAMPLE, predicted, test_images
from results import markdown, write_section
from shared_resnet20 import pretrained
from torch import Tensor, nn

from lightning_edge import export, load_artifact, quantize
from lightning_edge.artifact.session import Session
from lightning_edge.data import CIFAR10DataModule
from lightning_edge.export.timing import Latency, ratio, time_sessions

BATCHES, BATCH_SIZE = 4, 128
PEER, PEER_PREPROCESSED = "quantize_static", "quantize_static after pre-processing"


class Reader(CalibrationDataReader):
    """Calibration images, as the peer reads them."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._feeds: Iterator[dict[str, object]] = iter([{"images": batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, object] | None:
        """Return the next feed."""
        return next(self._feeds, None)


def plain_onnx(network: nn.Module, path: Path) -> Path:
    """Export by torch alone, for the peer."""
    batch = {0: torch.export.Dim("batch", min=1)}
    options = {"dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(network, EXAMPLE, path, input_names=["images"], dynamic_shapes=(batch,), **options)
    return path


def peer(source: Path, target: Path, batches: list[Tensor]) -> Path:
    """Quantize by onnxruntime."""
    quantize_static(
        source,
        target,
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return target


def files(folder: Path, *, weights: Path, batches: list[Tensor]) -> dict[str, Path]:
    """Write every file that is compared."""
    dense = pretrained(weights)
    int8 = quantize(dense, batches)
    written = {
        f"{name}{suffix}": export(network, folder / f"{name}{suffix}", example_inputs=EXAMPLE)
        for name, network in (("fp32", dense), ("int8", int8))
        for suffix in (".onnx", ".pte")
    }
    plain, prepared = plain_onnx(dense, folder / "plain.onnx"), folder / "prepared.onnx"
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    written[PEER] = peer(plain, folder / "peer.onnx", batches)
    written[PEER_PREPROCESSED] = peer(prepared, folder / "peer_prepared.onnx", batches)
    return written


def sessions(written: Mapping[str, Path]) -> dict[str, Session]:
    """Load each file into its runtime, and the .onnx files into OpenVINO as well."""
    loaded = {name: load_artifact(path, threads=1) for name, path in written.items()}
    if find_spec("openvino"):
        for name in ("fp32.onnx", "int8.onnx"):
            loaded[f"{name} in OpenVINO"] = load_artifact(written[name], threads=1, runtime="openvino")
    return loaded


def row(name: str, session: Session, timed: Mapping[str, Latency], images: Tensor, truth: Tensor) -> dict[str, str]:
    """Return one line of the table."""
    reference = {".pte": "fp32.pte", ".onnx in OpenVINO": "fp32.onnx in OpenVINO"}
    dense = next((timed[value] for key, value in reference.items() if name.endswith(key)), timed["fp32.onnx"])
    speed, to_peer = ratio(timed[name], dense), ratio(timed[name], timed[PEER])
    right = int((predicted(lambda batch: torch.from_numpy(session(batch.numpy())), images) == truth).sum())
    return {
        "file": name,
        "runtime": session.runtime,
        "top-1": f"{right:,}/{len(truth):,}",
        "bytes": f"{session.path.stat().st_size:,}",
        "p50 / p95, us": f"{1000 * timed[name].p50_ms:.0f} / {1000 * timed[name].p95_ms:.0f}",
        "fp32 / this": f"{speed.median:.3f} ({speed.low:.3f} to {speed.high:.3f})",
        "quantize_static / this": f"{to_peer.median:.3f} ({to_peer.low:.3f} to {to_peer.high:.3f})",
    }


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz, or its original folder")
    parser.add_argument("--weights", type=Path, required=True, help="pretrained ResNet-20")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = CIFAR10DataModule(path=arguments.data, validation_from="test", augment=False, batch_size=BATCH_SIZE)
    data.setup()
    torch.manual_seed(0)
    batches = [images for (images, _), _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    images, truth = test_images(data)
    with tempfile.TemporaryDirectory() as folder:
        loaded = sessions(files(Path(folder), weights=arguments.weights, batches=batches))
        example = (np.ascontiguousarray(images[:1].numpy()),)
        timed = time_sessions(loaded, example, blocks=20, calls_per_block=200, seconds=arguments.seconds)
        rows = [row(name, session, timed, images, truth) for name, session in loaded.items()]
    body = (
        "Batch 1, one thread, 20 blocks that take turns; ratios are medians over the blocks, with their 95 % interval,"
        f" and above 1 where this file is faster. {BATCHES * BATCH_SIZE} calibration images.\n\n{markdown(rows)}"
    )
    command = "python benchmarks/quantized_latency.py --data cifar10.npz --weights resnet20-12fca82f.th"
    write_section("ResNet-20, CIFAR-10, latency of int8", command=command, body=body)


if __name__ == "__main__":
    main()
