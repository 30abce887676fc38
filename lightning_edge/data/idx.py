"""The idx format of the MNIST files, gzipped or not."""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_UNSIGNED_BYTES = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the unsigned bytes of an idx file (http://yann.lecun.com/exdb/mnist/, "the IDX file format").

    Args:
        path: The file; one that ends in ``.gz`` is decompressed.

    Raises:
        ValueError: If the file is damaged, truncated, too long, or holds something other than unsigned bytes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    >>> read_idx(path).tolist()
    [7, 9]
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name} must be a whole gzip file, got a damaged one ({error}), at {path}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTES:
        raise ValueError(f"{path.name} must start with 00 00 08 (idx, bytes), got {content[:4].hex(' ')}, at {path}")
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    if len(content) != header + prod(shape):
        raise ValueError(
            f"{path.name} must hold {header + prod(shape)} bytes (header, {shape}), got {len(content)}, at {path}:"
            " copy or download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
