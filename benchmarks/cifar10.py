"""What CIFAR-10 files say on the test images: on those that settings were chosen by, and on the others."""

from pathlib import Path

import torch

from lightning_edge import load_artifact
from lightning_edge.data import CIFAR10DataModule


def images(path: Path) -> CIFAR10DataModule:
    """Return the test images: 0 to 4,999 as the validation part, 5,000 to 9,999 as the test part."""
    data = CIFAR10DataModule(path=path, validation_from="test", batch_size=50)  # a .pte takes at most 64 images
    data.setup()
    return data


def accuracy_percent(path: Path, data: CIFAR10DataModule) -> tuple[float, float, float]:
    """Return how many images the file labels correctly: of the validation part, the test part, and all 10,000, in %."""
    session = load_artifact(path, threads=2)
    halves = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        right = [torch.from_numpy(session(inputs.numpy())).argmax(1) == labels for inputs, labels in loader]
        halves.append(100 * float(torch.cat(right).float().mean()))
    return halves[0], halves[1], sum(halves) / 2
