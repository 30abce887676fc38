"""MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels (LeCun et al. 1998)."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_edge.data.idx import read_idx
from lightning_edge.data.images import ImageDataModule, ImageDataset, check_labels
from lightning_edge.data.npz import KEYS, read_npz

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
# Of the 60,000 training images, as fractions of full white.
_MEAN, _STD = 0.1307, 0.3081
_MAX_SHIFT = 2

Arrays = dict[str, NDArray[np.uint8]]


class MNISTDataModule(ImageDataModule):
    """MNIST: images float32 (batch, 1, 28, 28) with mean 0 and deviation 1, labels int64 (batch,).

    Args:
        path: An ``.npz`` with the arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``, or a
            folder with the four original idx files, gzipped or not. None: they are downloaded.
        folder: Where downloaded files are kept and looked for.
        batch_size: Images a step; the last batch of an epoch is smaller, nothing is dropped.
        num_workers: Loader processes; 0 is fastest, the images are in memory.
        validation_size: How many of the training images are for validation.
        seed: Of the split into training and validation.
        augment: Move each training image by up to 2 pixels, anew each time.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If an argument is out of its range.

    >>> MNISTDataModule(validation_size=10_000).input_shape
    (1, 28, 28)
    """

    num_classes = 10
    input_shape = (1, 28, 28)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        folder: str | Path = "data/mnist",
        batch_size: int = 128,
        num_workers: int = 0,
        validation_size: int = 5000,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if validation_size < 1:
            raise ValueError(f"validation_size must be at least 1, got {validation_size}")
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not self.path.exists():
            raise FileNotFoundError(
                f"path must be an .npz file or a folder of idx files, got {str(path)!r}, which does not exist"
                f" (seen from {Path.cwd()}): leave it out to download MNIST"
            )
        self.folder = Path(folder).expanduser()
        self.validation_size = validation_size
        self.seed = seed
        self.augment = augment

    def prepare_data(self) -> None:
        """Download what is missing, unless ``path`` says where the data are.

        Raises:
            ValueError: If a file that is already there has another checksum.
            OSError: If no mirror delivers a file with the right checksum.
        """
        if self.path is None:
            download(self.folder, mirrors=MIRRORS, checksums=SHA256)

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; every process does, and gets the same split.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or leaves no image to train on.
        """
        if self.test is not None:
            return
        source = self.path or self.folder
        arrays = read_npz(source) if source.is_file() else _read_folder(source)
        tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
        dataset = partial(ImageDataset, scale=1 / (255 * _STD), offset=-_MEAN / _STD)
        parts = []
        for part in ("train", "test"):
            images, labels = tensors[f"{part}_images"].unsqueeze(1), tensors[f"{part}_labels"].to(torch.int64)
            where = f"{part} of {source}"
            check_labels(images, labels, shape=self.input_shape, classes=self.num_classes, where=where)
            parts.append((images, labels))
        (images, labels), test = parts
        if self.validation_size >= len(images):
            raise ValueError(
                f"validation_size must be less than the {len(images)} training images, got {self.validation_size}"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        train, validation = order[: -self.validation_size], order[-self.validation_size :]
        shift = _MAX_SHIFT if self.augment else 0
        self.train = dataset(images[train], labels[train], max_shift=shift)
        self.validation = dataset(images[validation], labels[validation])
        self.test = dataset(*test)


def download(folder: Path, *, mirrors: Sequence[str], checksums: Mapping[str, str]) -> None:
    """Fetch the files that ``folder`` lacks; each is complete and has its checksum, or is not there at all.

    Args:
        folder: Created when missing.
        mirrors: Addresses that end in ``/``, tried in this order.
        checksums: File name to sha256, hexadecimal.

    Raises:
        ValueError: If a file that is already there has another checksum.
        OSError: If no mirror delivers a file with the right checksum; says what each of them answered.

    >>> download(Path("."), mirrors=[], checksums={})
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, checksum in checksums.items():
        path = folder / name
        if path.exists():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != checksum:
                raise ValueError(
                    f"sha256 of {name} must be {checksum}, got {found}, at {path}: delete it to download it again,"
                    " or use path= for data of your own"
                )
            continue
        rank_zero_info(f"downloading {name} to {folder}")
        _fetch(path, [mirror + name for mirror in mirrors], checksum)


def _fetch(path: Path, urls: Sequence[str], checksum: str) -> None:
    answers = []
    for url in urls:
        try:
            # Writes to a temporary name and renames once the checksum is right.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=checksum, progress=False)
        except (OSError, RuntimeError) as error:  # a failed connection; a wrong checksum
            answers.append(f"{url}: {error}")
        else:
            return
    raise OSError(
        f"{path.name} must come from one of {len(urls)} mirrors with sha256 {checksum}, got: {'; '.join(answers)}."
        f" Put the file into {path.parent} by hand, or give path="
    )


def _read_folder(folder: Path) -> Arrays:
    arrays = {}
    for key, zipped in zip(KEYS, SHA256, strict=True):
        names = (zipped.removesuffix(".gz"), zipped)
        found = [folder / name for name in names if (folder / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"folder must hold {names[0]}, gzipped or not, got {folder} without it:"
                " call prepare_data() to download, or give path="
            )
        arrays[key] = read_idx(found[0])
    return arrays
