"""Networks as files that a runtime opens: ONNX, ExecuTorch, and the packed ``.edge``."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SUFFIXES = (".edge", ".onnx", ".pte")

__all__ = ["SUFFIXES", "export"]


def export(
    module: "nn.Module",
    path: str | Path,
    *,
    example_inputs: "tuple[Any, ...] | Mapping[str, Any]",
    round_small: bool = True,
    adaptive: bool = True,
    recipe_hash: str = "",
) -> Path:
    """Write the network as one file that holds all it needs; the suffix of ``path`` says which kind.

    A network under quantization-aware training is written as its int8 network, any other in float. ONNX and ExecuTorch
    files hold every float weight bit for bit. So does a ``.edge`` file, but for what ``round_small`` rounds, and for
    weights that were shared with a scale per channel: the scale moves behind the layer, where it costs nothing. The
    file appears whole or not at all, and the same network gives the same bytes.

    Args:
        module: The network. It is exported in evaluation mode and left as it was.
        path: Ends in ``.onnx`` (onnxruntime, any batch size), ``.pte`` (ExecuTorch on XNNPACK, batches up to
            ``export.executorch.MAX_BATCH``), or ``.edge`` (the ONNX model, entropy-coded).
        example_inputs: A tuple of positional inputs, or a dict of them by name, batch first. They give types and sizes,
            the values of tensors do not matter. The file takes their tensors one by one, also where they are nested.
        round_small: In a ``.edge`` file, round biases, norms and the values of shared weights to float16 precision,
            by at most one part in 2048: two bytes each instead of four. Other weights keep their bits, and so does a
            network that rounds its activations to integers.
        adaptive: In a ``.edge`` file, also code tensors under adaptive contexts where that is smaller: a few percent
            less, for tenths of a second more when the file is loaded.
        recipe_hash: Kept in a ``.edge`` file to say which settings made it.

    Returns:
        The path written.

    Raises:
        ValueError: If the suffix is unknown, the network cannot be traced, or was quantized for other files.
        FileNotFoundError: If the folder does not exist.
        ImportError: If ``.pte`` is asked for without ExecuTorch.

    >>> import torch
    >>> export(torch.nn.Linear(4, 3), "model.onnx", example_inputs=(torch.zeros(2, 4),)).name
    'model.onnx'
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {list(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path must lie in a folder that exists, got {str(path)!r}: make {str(path.parent)!r} first"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        _write(module, draft, example_inputs, round_small, adaptive, recipe_hash)
        draft.replace(path)
    return path


def _write(
    module: "nn.Module",
    path: Path,
    example_inputs: "tuple[Any, ...] | Mapping[str, Any]",
    round_small: bool,
    adaptive: bool,
    recipe_hash: str,
) -> None:
    # Imported here, so that reading a file needs no torch and writing ONNX no ExecuTorch.
    from lightning_edge.surgery.post_training import check_exportable

    scheme = check_exportable(module, path.suffix)
    if path.suffix == ".pte":
        from lightning_edge.export.executorch import to_executorch

        path.write_bytes(to_executorch(module, example_inputs))
        return
    from lightning_edge.export.onnx import to_onnx

    model = to_onnx(module, example_inputs)
    if path.suffix == ".onnx":
        from lightning_edge.export.narrow import store_narrow_

        store_narrow_(model, scheme)
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    from lightning_edge.artifact import pack
    from lightning_edge.export.bias_steps import derive_bias_steps_
    from lightning_edge.export.channel_scales import merge_channel_scales_
    from lightning_edge.export.halves import round_small_

    merge_channel_scales_(model)
    derive_bias_steps_(model)
    if round_small:
        round_small_(model)
    pack(model, path, recipe_hash=recipe_hash, adaptive=adaptive)
