"""Static int8 of the pretrained ResNet-20 on CIFAR-10, after training: every observer, three draws of 512 images.

Accuracy is that of the exported file in its own runtime. The published weights have seen all 50,000 training images, so
there is no validation split: an observer is chosen on the test images 0 to 4,999 and reported on 5,000 to 9,999.
Calibration images are training images, without augmentation; the seed draws them.

Run: python benchmarks/quantized_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from results import markdown, write_section
from shared_resnet20 import pretrained
from torch import Tensor, nn

from lightning_edge import export, load_artifact, quantize
from lightning_edge.data import CIFAR10DataModule
from lightning_edge.surgery.bias_correction import correct_bias_
from lightning_edge.surgery.equalization import equalize_
from lightning_edge.surgery.observers import OBSERVERS
from lightning_edge.surgery.quantization import convert

SEEDS = (0, 1, 2)
BATCHES, BATCH_SIZE = 4, 128
FILE_BATCH = 50  # a .pte takes at most 64 images
EXAMPLE = (torch.zeros(2, 3, 32, 32),)
EXTRAS = ("histogram, biases corrected", "histogram, equalized, biases corrected")


def test_images(data: CIFAR10DataModule) -> tuple[Tensor, Tensor]:
    """Return all 10,000 test images in their order, and their labels."""
    parts = [data.validation, data.test]
    batches = [part.__getitems__(range(len(part))) for part in parts if part is not None]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def predicted(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the label of each image."""
    with torch.no_grad():
        return torch.cat([run(batch.contiguous()).argmax(1) for batch in images.split(FILE_BATCH)])


def of_file(network: nn.Module, path: Path, images: Tensor) -> Tensor:
    """Export the network and return what the file says."""
    session = load_artifact(export(network, path, example_inputs=EXAMPLE), threads=1)
    return predicted(lambda batch: torch.from_numpy(session(batch.numpy())), images)


def quantized(name: str, seed: int, *, weights: Path, data: CIFAR10DataModule) -> nn.Module:
    """Return the int8 network."""
    network = pretrained(weights)
    data.batch_size = BATCH_SIZE
    if "equalized" in name:
        equalize_(network, EXAMPLE)
    torch.manual_seed(seed)
    batches = [images for (images, _), _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    int8 = quantize(network, batches, observer=name.split(",")[0])
    if "biases" in name:
        correct_bias_(int8, network, batches)
    return int8


def accuracies(labels: Tensor, truth: Tensor) -> list[float]:
    """Return percent right of the first half, of the second half, and of all."""
    right = (labels == truth).double()
    return [100 * float(part.mean()) for part in (right[:5000], right[5000:], right)]


def spread(values: list[float]) -> str:
    """Return the mean with its standard error."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def row(name: str, *, weights: Path, data: CIFAR10DataModule, images: Tensor, truth: Tensor) -> dict[str, str]:
    """Measure one observer with every seed."""
    onnx, pte, agreeing = [], [], {"onnx": 0, "pte": 0}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            network = quantized(name, seed, weights=weights, data=data)
            graph = predicted(convert(network), images)
            files = {suffix: of_file(network, Path(folder) / f"model.{suffix}", images) for suffix in agreeing}
            onnx.append(accuracies(files["onnx"], truth))
            pte.append(accuracies(files["pte"], truth))
            for suffix, labels in files.items():
                agreeing[suffix] += int((labels == graph).sum())
            print(name, seed, onnx[-1], pte[-1], agreeing, flush=True)
    chosen, reported, everything = ([run[part] for run in onnx] for part in range(3))
    total = len(SEEDS) * len(truth)
    return {
        "ranges by": name,
        "`.onnx`, 5,000 to 9,999, %": spread(reported),
        "`.onnx`, all 10,000, %": spread(everything),
        "`.pte`, all 10,000, %": spread([run[2] for run in pte]),
        "`.onnx`, 0 to 4,999 (to choose by), %": spread(chosen),
        "labels as the converted graph, `.onnx`": f"{agreeing['onnx']:,}/{total:,}",
        "`.pte`": f"{agreeing['pte']:,}/{total:,}",
    }


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz, or its original folder")
    parser.add_argument("--weights", type=Path, required=True, help="pretrained ResNet-20")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = CIFAR10DataModule(path=arguments.data, validation_from="test", augment=False)
    data.setup()
    images, truth = test_images(data)
    with tempfile.TemporaryDirectory() as folder:
        dense = accuracies(of_file(pretrained(arguments.weights), Path(folder) / "dense.onnx", images), truth)
    measured = {"weights": arguments.weights, "data": data, "images": images, "truth": truth}
    rows = [row(name, **measured) for name in (*OBSERVERS, *EXTRAS)]
    body = (
        f"Dense `.onnx`: {dense[1]:.2f} % on the images 5,000 to 9,999, {dense[2]:.2f} % on all, {dense[0]:.2f} % on 0"
        f" to 4,999. int8 weights per channel, int8 activations per tensor, {BATCHES * BATCH_SIZE} calibration images;"
        f" means of the seeds {', '.join(map(str, SEEDS))} with their standard error.\n\n{markdown(rows)}"
    )
    command = "python benchmarks/quantized_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th"
    write_section("ResNet-20, CIFAR-10, int8 after training", command=command, body=body)


if __name__ == "__main__":
    main()
