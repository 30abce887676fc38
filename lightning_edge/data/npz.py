"""The .npz form of an image data set: four arrays."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels`` of an ``.npz``.

    Raises:
        ValueError: If it is no ``.npz``, or lacks one of them.
    """
    try:
        # Opened here: NumPy leaves the file open when it is no zip archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in KEYS}
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"path must be an .npz with {', '.join(KEYS)}, got {path} ({error})") from error
