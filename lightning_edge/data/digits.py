"""Handwritten digits of 8 x 8 pixels, shipped with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_edge.data.images import ImageDataModule, ImageDataset


class DigitsDataModule(ImageDataModule):
    """Scikit-learn's 1,797 digits: images float32 (batch, 1, 8, 8) in [0, 1], labels int64 (batch,).

    The 599 test images are the same for every seed, so that no network is ever tested on an image it, or the network
    it started from, was trained on. Both splits are stratified.

    Args:
        batch_size: Images a step; the last batch of an epoch is smaller, nothing is dropped.
        num_workers: Loader processes; 0 is fastest, the images are in memory.
        validation_fraction: How much of the other 1,198 images is for validation, in (0, 1).
        seed: Of the split into training and validation.

    Raises:
        ValueError: If an argument is out of its range.

    >>> data = DigitsDataModule()
    >>> data.setup()
    >>> [len(part) for part in (data.train, data.validation, data.test)]
    [1018, 180, 599]
    """

    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(
        self, *, batch_size: int = 64, num_workers: int = 0, validation_fraction: float = 0.15, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie in (0, 1), got {validation_fraction}")
        self.validation_fraction = validation_fraction
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; every process does, and gets the same split."""
        if self.test is not None:
            return
        pixels, labels = load_digits(return_X_y=True)
        rest, test = train_test_split(range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
        train, validation = train_test_split(
            rest, test_size=self.validation_fraction, stratify=labels[rest], random_state=self.seed
        )
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, *self.input_shape)
        targets = torch.from_numpy(labels).to(torch.int64)
        # Sixteen grey levels.
        self.train, self.validation, self.test = (
            ImageDataset(images[part], targets[part], scale=1 / 16) for part in (train, validation, test)
        )
