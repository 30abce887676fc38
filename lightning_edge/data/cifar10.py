"""CIFAR-10 (Krizhevsky 2009): from an .npz, from the original binary files, or downloaded."""

import hashlib
import tarfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_edge.data.images import ImageDataModule, ImageDataset, check_labels
from lightning_edge.data.npz import read_npz

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = ("test_batch.bin",)
# Those of ImageNet, which the published networks for CIFAR-10 were trained with; on pixels in [0, 1], RGB.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MAX_SHIFT = 4

Part = tuple[Tensor, Tensor]


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: float32 (batch, 3, 32, 32), normalized with ImageNet's mean and deviation; labels int64 (batch,).

    Args:
        path: An ``.npz`` with the arrays ``train_images`` (n, 32, 32, 3) uint8, ``train_labels``, ``test_images`` and
            ``test_labels``, or a folder with the original ``data_batch_1.bin`` ... ``test_batch.bin``. None: download.
        folder: Where downloaded files are kept and looked for.
        batch_size: Images a step; the last batch of an epoch is smaller, nothing is dropped.
        num_workers: Loader processes; 0 is fastest, the images are in memory.
        validation_size: How many images are for validation.
        validation_from: Where they come from: ``"train"``, drawn at random and not trained on; or ``"test"``, the
            first ones of the test images, for a pretrained network that has already seen every training image. The
            test set is then what is left of the test images.
        seed: Of the split into training and validation.
        augment: Move each training image by up to 4 pixels and mirror half of them, anew each time.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If an argument is out of its range.

    >>> CIFAR10DataModule(validation_from="test").input_shape
    (3, 32, 32)
    """

    num_classes = 10
    input_shape = (3, 32, 32)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        folder: str | Path = "data/cifar10",
        batch_size: int = 128,
        num_workers: int = 0,
        validation_size: int = 5000,
        validation_from: Literal["train", "test"] = "train",
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if validation_size < 1:
            raise ValueError(f"validation_size must be at least 1, got {validation_size}")
        if validation_from not in ("train", "test"):
            raise ValueError(f"validation_from must be 'train' or 'test', got {validation_from!r}")
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not self.path.exists():
            raise FileNotFoundError(
                f"path must be an .npz file or a folder of .bin files, got {str(path)!r}, which does not exist"
                f" (seen from {Path.cwd()}): leave it out to download CIFAR-10"
            )
        self.folder = Path(folder).expanduser()
        self.validation_size = validation_size
        self.validation_from = validation_from
        self.seed = seed
        self.augment = augment

    def prepare_data(self) -> None:
        """Download what is missing, unless ``path`` says where the data are.

        Raises:
            OSError: If the file cannot be had, or has another checksum.
        """
        if self.path is None and not (self.folder / _FOLDER).is_dir():
            download(self.folder, url=URL, md5=MD5)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; every process does, and gets the same split.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or leaves no image to train or to test on.
        """
        if self.test is not None:
            return
        source = self.path or self.folder / _FOLDER
        train, test = (
            _read_arrays(source) if source.is_file() else (_read_bins(source, _TRAIN), _read_bins(source, _TEST))
        )
        for part, (images, labels) in (("train", train), ("test", test)):
            where = f"{part} of {source}"
            check_labels(images, labels, shape=self.input_shape, classes=self.num_classes, where=where)
        drawn_from = train if self.validation_from == "train" else test
        if self.validation_size >= len(drawn_from[1]):
            raise ValueError(
                f"validation_size must be less than the {len(drawn_from[1])} images of validation_from="
                f"{self.validation_from!r}, got {self.validation_size}"
            )
        if self.validation_from == "train":
            order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(self.seed))
            validation, train = (
                _take(train, order[-self.validation_size :]),
                _take(train, order[: -self.validation_size]),
            )
        else:
            order = torch.arange(len(test[1]))
            validation, test = _take(test, order[: self.validation_size]), _take(test, order[self.validation_size :])
        scale = tuple(1 / (255 * deviation) for deviation in _STD)
        offset = tuple(-mean / deviation for mean, deviation in zip(_MEAN, _STD, strict=True))
        dataset = partial(ImageDataset, scale=scale, offset=offset)
        self.train = dataset(*train, max_shift=_MAX_SHIFT if self.augment else 0, flip=self.augment)
        self.validation = dataset(*validation)
        self.test = dataset(*test)


def download(folder: Path, *, url: str, md5: str) -> None:
    """Fetch and unpack the archive of the original files; they are all there, or none of them.

    Args:
        folder: Created when missing.
        url: Of the ``.tar.gz``.
        md5: Hexadecimal, as the data's authors publish it.

    Raises:
        OSError: If the file cannot be had, or has another checksum.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / url.rsplit("/", 1)[-1]
    rank_zero_info(f"downloading {url} to {folder}")
    torch.hub.download_url_to_file(url, str(archive), progress=False)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        archive.unlink()
        raise OSError(f"md5 of {url} must be {md5}, got {found}: try again, or give path=")
    with tarfile.open(archive) as files:
        files.extractall(folder / ".unpacked", filter="data")
    (folder / ".unpacked" / _FOLDER).replace(folder / _FOLDER)
    (folder / ".unpacked").rmdir()
    archive.unlink()


def _take(part: Part, indices: Tensor) -> Part:
    images, labels = part
    return images[indices], labels[indices]


def _read_arrays(path: Path) -> tuple[Part, Part]:
    arrays = read_npz(path)
    parts = []
    for part in ("train", "test"):
        images = torch.from_numpy(np.array(arrays[f"{part}_images"]))
        if images.ndim != 4:
            raise ValueError(f"{part}_images must be of shape (n, 32, 32, 3), got {tuple(images.shape)}, in {path}")
        labels = torch.from_numpy(np.array(arrays[f"{part}_labels"])).to(torch.int64)
        parts.append((images.permute(0, 3, 1, 2).contiguous(), labels))
    return parts[0], parts[1]


def _read_bins(folder: Path, names: tuple[str, ...]) -> Part:
    """Read records of a label byte and 3 x 32 x 32 pixel bytes, red plane first."""
    record = 1 + 3 * 32 * 32
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"folder must hold {name}, got {folder} without it: download again, or give path=")
        data = np.fromfile(path, np.uint8)
        if not len(data) or len(data) % record:
            raise ValueError(f"{name} must be whole records of {record} bytes, got {len(data)} bytes, at {path}")
        parts.append(torch.from_numpy(data.reshape(-1, record)))
    records = torch.cat(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].to(torch.int64)
