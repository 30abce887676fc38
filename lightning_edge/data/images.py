"""Small image data sets that live in memory, fetched a batch at a time."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class ImageDataset(Dataset[Batch]):
    """Images kept as bytes; a whole batch is gathered, shifted and scaled in a few tensor operations.

    ``DataLoader`` calls ``__getitems__`` where there is one, so an ordinary loader (any sampler, any number of workers)
    needs no Python per image. Its ``collate_fn`` has to be :func:`whole_batch`.

    Args:
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,).
        scale: Factor from a byte to the network's input; a number, or one for each channel.
        offset: Added after scaling; as ``scale``.
        max_shift: Images are moved by up to so many pixels in each direction, zeros moving in. The shifts are drawn
            from torch's global generator, so that whoever restores its state gets the same images.
        flip: Mirror half of the images, left to right; drawn from the same generator.

    >>> data = ImageDataset(torch.ones(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), scale=0.5)
    >>> data.__getitems__([2, 0])[1]
    tensor([2, 0])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scale: float | Sequence[float],
        offset: float | Sequence[float] = 0.0,
        max_shift: int = 0,
        flip: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.scale = torch.tensor(scale).view(-1, 1, 1)
        self.offset = torch.tensor(offset).view(-1, 1, 1)
        self.max_shift = max_shift
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[chosen]
        if self.max_shift:
            images = randomly_shifted(images, max_shift=self.max_shift)
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        return images.float().mul_(self.scale).add_(self.offset), self.labels[chosen]


def randomly_shifted(images: Tensor, *, max_shift: int) -> Tensor:
    """Return every image moved by its own whole number of pixels in [-max_shift, max_shift], per axis.

    Args:
        images: Shape (n, channels, height, width), any dtype. Zeros move in.
        max_shift: In pixels, at least 0. Drawn from torch's global generator.

    >>> randomly_shifted(torch.ones(1, 1, 2, 2), max_shift=0).sum()
    tensor(4.)
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4)
    corner = torch.randint(0, 2 * max_shift + 1, (2, n, 1))
    rows = (corner[0] + torch.arange(height))[:, :, None]
    columns = (corner[1] + torch.arange(width))[:, None, :]
    # Indexed axes that a slice separates come first: (n, height, width, channels).
    return padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def whole_batch(batch: Any) -> Any:
    """Return the batch as it is: ``ImageDataset`` has collated it.

    >>> whole_batch((torch.zeros(1), torch.ones(1)))
    (tensor([0.]), tensor([1.]))
    """
    return batch


class ImageDataModule(L.LightningDataModule):
    """Train, validation and test loaders over three data sets that ``setup`` of a subclass assigns.

    Attributes:
        num_classes: How many classes there are.
        input_shape: Shape of one image, (channels, height, width).
    """

    num_classes: int
    input_shape: tuple[int, int, int]

    def __init__(self, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train: ImageDataset | None = None
        self.validation: ImageDataset | None = None
        self.test: ImageDataset | None = None

    @property
    def example_input(self) -> Tensor:
        """Two fixed random images in [0, 1]; of a batch of one, ``torch.export`` would make a constant."""
        return torch.rand(2, *self.input_shape, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches of training images."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation images, in order."""
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test images, in order."""
        return self._loader(self.test)

    def _loader(self, data: ImageDataset | None, *, shuffle: bool = False) -> DataLoader[Batch]:
        if data is None:
            raise RuntimeError(f"{type(self).__name__} must be set up first: call prepare_data() and setup()")
        return DataLoader(data, self.batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=whole_batch)


def check_labels(images: Tensor, labels: Tensor, *, shape: tuple[int, int, int], classes: int, where: str) -> None:
    """Raise unless there is one label in [0, classes) for each image of ``shape``.

    Raises:
        ValueError: If they do not fit together; names ``where`` they come from.

    >>> check_labels(torch.zeros(2, 1, 4, 4), torch.tensor([0, 9]), shape=(1, 4, 4), classes=10, where="a.npz")
    """
    if not len(images) or tuple(images.shape[1:]) != shape:
        raise ValueError(f"images must be of shape (n >= 1, {shape}), got {tuple(images.shape)}, in {where}")
    if labels.shape != (len(images),):
        raise ValueError(f"labels must be one for each of {len(images)} images, got {tuple(labels.shape)}, in {where}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels must lie in [0, {classes}), got [{int(labels.min())}, {int(labels.max())}], in {where}"
        )
