"""What fake quantizers know of the data: read, restored, and agreed on by several processes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_edge.surgery.quantizers import Quantizer

_STATE = ("min_val", "max_val", "scale", "zero_point", "log_clip")
Quantizers = Mapping[str, Quantizer]


def state_of(quantizers: Quantizers) -> dict[str, Tensor]:
    """Return ranges, scales and zero points as copies, by ``"<name>.<key>"``."""
    return {
        f"{name}.{key}": _tensor(quantizer, key).detach().clone()
        for name, quantizer in quantizers.items()
        for key in _STATE
    }


def load_state_(quantizers: Quantizers, state: Mapping[str, Tensor]) -> None:
    """Take over what :func:`state_of` gave, whatever the shapes were.

    Raises:
        ValueError: If names are missing or too many.
    """
    expected = {f"{name}.{key}" for name in quantizers for key in _STATE}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"observers must have the names of this network's observers, got {unexpected[:3]} that it does not "
            f"know and no {missing[:3]}: capture the same network as the one the state was saved from"
        )
    with torch.inference_mode(False):  # what is made in inference mode could not be trained
        for name, quantizer in quantizers.items():
            for key in _STATE:
                loaded = state[f"{name}.{key}"].detach().to(_tensor(quantizer, key).device, copy=True)
                if key == "log_clip":
                    quantizer.log_clip.data = loaded
                else:
                    setattr(_owner(quantizer, key), key, loaded)


def ranges_of(quantizers: Quantizers) -> tuple[Tensor, Tensor]:
    """Return all minima and all maxima as two vectors, for ranks to agree on their minimum and maximum."""
    observers = [quantizer.activation_post_process for quantizer in quantizers.values()]
    return torch.cat([o.min_val.reshape(-1) for o in observers]), torch.cat([o.max_val.reshape(-1) for o in observers])


def set_ranges_(quantizers: Quantizers, minima: Tensor, maxima: Tensor) -> None:
    """Take the vectors of :func:`ranges_of` back.

    Raises:
        ValueError: If the sizes differ from those that :func:`ranges_of` gave.
    """
    sizes = [quantizer.activation_post_process.min_val.numel() for quantizer in quantizers.values()]
    if minima.shape != (sum(sizes),) or maxima.shape != (sum(sizes),):
        raise ValueError(
            f"minima and maxima must have {sum(sizes)} values, got {tuple(minima.shape)} and {tuple(maxima.shape)}"
        )
    pieces = zip(quantizers.values(), torch.split(minima, sizes), torch.split(maxima, sizes), strict=True)
    for quantizer, low, high in pieces:
        set_range_(quantizer, low, high)


def set_range_(quantizer: Quantizer, low: Tensor, high: Tensor) -> None:
    """Set the range that was seen, and the scale and zero point that follow from it."""
    observer = quantizer.activation_post_process
    observer.min_val.copy_(low.view_as(observer.min_val))
    observer.max_val.copy_(high.view_as(observer.max_val))
    if has_range(quantizer):
        scale, zero_point = quantizer.calculate_qparams()
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)


def has_range(quantizer: Quantizer) -> bool:
    """Whether it has seen data."""
    low = quantizer.activation_post_process.min_val
    return low.numel() > 0 and bool(torch.isfinite(low).all())


def _owner(quantizer: Quantizer, key: str) -> torch.nn.Module:
    owner: torch.nn.Module = quantizer.activation_post_process if key in ("min_val", "max_val") else quantizer
    return owner


def _tensor(quantizer: Quantizer, key: str) -> Tensor:
    tensor = getattr(_owner(quantizer, key), key)
    assert isinstance(tensor, Tensor)
    return tensor
