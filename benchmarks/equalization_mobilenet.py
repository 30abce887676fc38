"""What equalization, batch norms estimated anew and bias correction do for int8 of a depthwise-separable network.

A network of six depthwise-separable blocks is trained on MNIST. Larger networks of its kind have channels of very
different ranges (Nagel et al. 2019, arXiv:1906.04721, figure 2); the second network is the same function with its
channels scaled by powers of two from 2**-4 to 2**4, which batch norms and the next layers take back. Every network is
then quantized after training; errors are those of the exported file over all 10,000 test images.

Run: python benchmarks/equalization_mobilenet.py --data mnist.npz
"""

import argparse
import copy
import tempfile
from pathlib import Path

import lightning as L
import torch
from results import markdown, write_section
from torch import Tensor, nn

from lightning_edge import correct_bias_, equalize_, export, load_artifact, quantize, reestimate_batch_norms_
from lightning_edge.data import MNISTDataModule
from lightning_edge.modules import ClassificationModule

EPOCHS, BATCH_SIZE, BATCHES = 2, 128, 16
WIDTHS = ((16, 2), (32, 1), (32, 2), (64, 1), (64, 1))
EXAMPLE = (torch.zeros(2, 1, 28, 28),)
STEPS = ("", "equalized", "biases corrected", "norms anew", "equalized, biases corrected", "equalized, norms anew")


def separable(channels: int, width: int, stride: int) -> list[nn.Module]:
    """Return a depthwise and a pointwise convolution, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, width, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(channels), nn.ReLU(), pointwise, nn.BatchNorm2d(width), nn.ReLU()]


def mobile_network() -> nn.Sequential:
    """Return the network, without weights worth mentioning."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width, stride in WIDTHS:
        layers += separable(channels, width, stride)
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def trained(data: MNISTDataModule) -> nn.Sequential:
    """Return the network after its training."""
    L.seed_everything(0, verbose=False)
    network = mobile_network()
    module = ClassificationModule(network, optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet).fit(module, datamodule=data)
    return network.eval()


@torch.no_grad()
def uneven(network: nn.Sequential) -> nn.Sequential:
    """Return the same function with channels of very different ranges."""
    other, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    norms = [index for index, layer in enumerate(other) if isinstance(layer, nn.BatchNorm2d)]
    for index in norms[:-1]:  # behind the last one comes a pool
        norm, reader = other[index], other[index + 2]
        factors = torch.exp2(torch.randint(-4, 5, norm.weight.shape, generator=generator).float())
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        reader.weight.div_(factors.view(-1, 1, 1, 1) if reader.groups > 1 else factors.view(1, -1, 1, 1))
    return other


def quantized(network: nn.Module, steps: str, batches: list[Tensor]) -> nn.Module:
    """Return the int8 network after these steps."""
    plain = copy.deepcopy(network)
    if "equalized" in steps:
        equalize_(plain, EXAMPLE)
    int8 = quantize(plain, batches)
    if "norms" in steps:
        reestimate_batch_norms_(int8, batches)
    if "biases" in steps:
        correct_bias_(int8, plain, batches)
    return int8


def wrong(network: nn.Module, folder: Path, data: MNISTDataModule) -> str:
    """Return how many test images the exported file gets wrong."""
    session = load_artifact(export(network, folder / "model.onnx", example_inputs=EXAMPLE))
    count = total = 0
    for images, labels in data.test_dataloader():
        count += int((session(images.numpy()).argmax(1) != labels.numpy()).sum())
        total += len(labels)
    return f"{count}/{total}"


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST as an .npz, or its original folder")
    data = MNISTDataModule(path=parser.parse_args().data, batch_size=BATCH_SIZE)
    network = trained(data)
    data.setup("test")
    torch.manual_seed(0)
    batches = [images for (images, _), _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    networks = {"as trained": network, "channels of very different ranges": uneven(network)}
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"file": "fp32"} | {name: wrong(net, Path(folder), data) for name, net in networks.items()}]
        for steps in STEPS:
            found = {name: wrong(quantized(net, steps, batches), Path(folder), data) for name, net in networks.items()}
            rows.append({"file": f"int8, {steps}".removesuffix(", ")} | found)
    body = (
        f"Wrong of all test images. {EPOCHS} epochs of training, {BATCHES * BATCH_SIZE} calibration images, seed 0;"
        f" {sum(parameter.numel() for parameter in network.parameters()):,} parameters.\n\n{markdown(rows)}"
    )
    command = "python benchmarks/equalization_mobilenet.py --data mnist.npz"
    write_section("Depthwise-separable network, MNIST, int8 after training", command=command, body=body)


if __name__ == "__main__":
    main()
