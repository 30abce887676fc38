"""Write a packed file from an ONNX model, a safetensors file, a checkpoint or a state dict."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

import lightning_edge
from lightning_edge.artifact.codebooks import BFLOAT16
from lightning_edge.artifact.format import INDEX, MAGIC, META, TENSORS, join_sections
from lightning_edge.artifact.reading import SAFETENSORS, check_folder, write_atomically
from lightning_edge.artifact.splitting import Typed, is_storable, split_model
from lightning_edge.artifact.tensors import DTYPES, encode_tensor
from lightning_edge.functional.bytestream import varint

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".bin")
"""Suffixes of files that torch has saved."""


@dataclass(frozen=True)
class PackedSize:
    """One tensor of a file that was just written."""

    name: str
    size_bytes: int
    codec: str


@dataclass(frozen=True)
class PackReport:
    """What :func:`pack` wrote, in bytes; ``graph_bytes`` are of the graph and of the tensors' names."""

    path: Path
    size_bytes: int
    graph_bytes: int
    tensors: tuple[PackedSize, ...]


def pack(
    source: "str | Path | ModelProto | Mapping[str, NDArray[Any] | Tensor]",
    path: str | Path,
    *,
    recipe_hash: str = "",
    adaptive: bool = True,
) -> PackReport:
    """Write ``source`` as one small file, every tensor bit by bit as it was.

    The bytes depend on ``source``, the options and the version of this library alone. The file is written under a
    temporary name and renamed: a writer that is killed leaves the old file or the new one. Of an ONNX model, metadata
    and descriptions are dropped, values that only nodes see get short names, large tensors in Constant nodes become
    initializers, and equal ones become one.

    Args:
        source: An ONNX model or the path of one (``.onnx``), the path of a ``.safetensors`` file, a state dict (a
            mapping from names to numpy arrays or torch tensors), or the path of one that torch has saved (``.pt``,
            ``.pth``, ``.th``, ``.ckpt``, ``.bin``; also of a checkpoint that holds one under "state_dict").
        path: The file to write.
        recipe_hash: What the file says about the settings that made it.
        adaptive: Also code tensors under adaptive contexts where that is smaller: it takes longer to pack, and to read
            in numpy.

    Raises:
        ValueError: If ``source`` is none of these, or a name or an element type cannot be stored.
        FileNotFoundError: If there is no file at ``source``, or no folder for ``path``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> [row.codec for row in pack({"w": np.zeros((64, 64), np.float32)}, folder / "w.edge").tensors]
    ['constant']
    """
    path = Path(path)
    check_folder(path)
    graph, tensors = _read_source(source)
    names = list(tensors)
    if unfit := [name for name in names if not is_storable(name)]:
        raise ValueError(f"tensor names must be strings without a line break, and not empty, got {unfit[:3]}")
    encoded = {name: encode_tensor(array, dtype, adaptive=adaptive) for name, (array, dtype) in tensors.items()}
    joined = "\n".join(names).encode()
    index = zstandard.ZstdCompressor(level=19, write_content_size=False, write_checksum=False).compress(
        varint(len(joined)) + joined + graph
    )
    meta = lightning_edge.__version__ + (f"\0{recipe_hash}" if recipe_hash else "")
    records = b"".join(record for record, _ in encoded.values())
    data = join_sections({META: meta.encode(), INDEX: index, TENSORS: records})
    write_atomically(path, data)
    rows = tuple(PackedSize(name, len(record), codec) for name, (record, codec) in encoded.items())
    return PackReport(path, len(data), len(index), rows)


def _read_source(source: Any) -> tuple[bytes, dict[str, Typed]]:
    if isinstance(source, Mapping):
        return b"", {name: _typed(name, value) for name, value in source.items()}
    if hasattr(source, "SerializeToString"):
        return split_model(source)
    if not isinstance(source, str | Path):
        raise ValueError(f"source must be a path, an ONNX model or a state dict, got a {type(source).__name__}")
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(
            f"source must be a file, got {str(file)!r}, which does not exist (seen from {Path.cwd()})"
        )
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) == MAGIC:
            raise ValueError(f"source must not be packed, got {str(file)!r}, a .edge file: unpack it first")
    if file.suffix == ".onnx":
        import onnx

        return split_model(onnx.load(file))
    if file.suffix == ".safetensors":
        return b"", dict(_read_safetensors(file))
    if file.suffix in CHECKPOINTS:
        return b"", {name: _typed(name, value) for name, value in _read_checkpoint(file).items()}
    raise ValueError(f"source must end in one of .onnx, .safetensors, {', '.join(CHECKPOINTS)}, got {file.name!r}")


def _typed(name: str, value: Any) -> Typed:
    """Return the array and its element type; a torch tensor is known by its methods, so that none is imported."""
    if hasattr(value, "detach"):
        if str(value.layout) != "torch.strided":
            raise ValueError(f"tensors must be dense, got {value.layout} in {name!r}: pack its to_dense()")
        value = value.detach().cpu().contiguous()
        if str(value.dtype) == "torch.bfloat16":
            import torch

            return value.view(torch.uint16).numpy(), BFLOAT16
        try:
            value = value.numpy()
        except TypeError as error:  # a type that numpy does not have
            raise _unknown_type(name, value.dtype) from error
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(f"source must hold tensors alone, got a {type(value).__name__} under {name!r}: leave it out")
    kinds = [code for code, dtype in DTYPES.items() if dtype == array.dtype.newbyteorder("<") and code != BFLOAT16]
    if not kinds:
        raise _unknown_type(name, array.dtype)
    return array, kinds[0]


def _unknown_type(name: str, dtype: object) -> ValueError:
    known = sorted({dtype.name for dtype in DTYPES.values()})
    return ValueError(f"tensors must have one of the types {known} or bfloat16, got {dtype} in {name!r}")


def _read_safetensors(path: Path) -> Iterator[tuple[str, Typed]]:
    data = path.read_bytes()
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS:
                raise ValueError(
                    f"tensors must have one of the types {list(SAFETENSORS)}, got {entry['dtype']} in {name!r}"
                )
            kind = SAFETENSORS[entry["dtype"]]
            start, end = entry["data_offsets"]
            flat = np.frombuffer(data[8 + size + start : 8 + size + end], DTYPES[kind])
            yield name, (flat.reshape(entry["shape"]), kind)
    except (struct.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"source must be a safetensors file, got {path}, which cannot be read: {error}") from error


def _read_checkpoint(path: Path) -> "dict[str, Tensor]":
    """Return the state dict that a file of torch is, or holds under "state_dict"."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile and torch: they have no common class
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"source must be a file that torch loads with weights_only=True, got {path}, which cannot be read: {reason}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise ValueError(f"source must hold a state dict, itself or under 'state_dict', got a {type(state).__name__}")
    unfit = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if unfit:
        raise ValueError(
            f"source must hold tensors by name, itself or under 'state_dict', got others under {unfit[:3]} in {path}"
        )
    return dict(state)
