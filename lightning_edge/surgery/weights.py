"""Weights of a network from a file, whatever wrote it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_edge.surgery.widths import load_widths_


def load_weights_(network: nn.Module, path: str | Path) -> None:
    """Load the weights of a Lightning checkpoint, of a saved ``state_dict``, or of what a model zoo publishes.

    The names in the file may have a prefix (``module.``, ``student.network.``); what has another one is not read.
    A network whose channels were removed gets narrow first, by the manifest that its checkpoint carries.

    Args:
        network: The plain network.
        path: Read with ``weights_only=True``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold weights of this network.

    >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}}, "line.th")
    >>> line = nn.Linear(2, 1); load_weights_(line, "line.th"); line(torch.ones(1, 2)).item()
    2.0
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, got {str(path)!r}, which is none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile and itself raise
        raise ValueError(
            "checkpoint must be a file of tensors, numbers and strings, which torch.load reads with weights_only=True,"
            f" got {path} ({type(error).__name__}): save network.state_dict() alone"
        ) from error
    weights = state.get("state_dict", state) if isinstance(state, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ValueError(f"checkpoint must hold a state_dict, got {path} with a {type(weights or state).__name__}")
    first = next(iter(network.state_dict()))
    names = [name for name in weights if isinstance(name, str)]
    prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")]
    if not prefixes:
        raise ValueError(f"checkpoint must hold weights of {type(network).__name__}, got {path} without {first!r}")
    prefix = min(prefixes, key=len)
    load_widths_(network, state)
    try:
        network.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint must hold weights of {type(network).__name__}, got {path}: {reason}") from error
