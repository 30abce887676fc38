"""Error, bytes and latency of files, each in its own runtime."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_edge.export.timing import Latency, Session, time_sessions

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """How many of ``total`` inputs were classified wrongly."""

    wrong: int
    total: int

    @property
    def error_percent(self) -> float:
        """Wrong inputs in percent."""
        return 100.0 * self.wrong / self.total

    @property
    def interval_percent(self) -> tuple[float, float]:
        """The 95 % interval of the error in percent (Wilson 1927); unlike the normal one it is right near zero."""
        n, p, z2 = self.total, self.wrong / self.total, _Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return 100.0 * max(0.0, centre - half), 100.0 * min(1.0, centre + half)


@dataclass(frozen=True)
class Measurement:
    """What was measured on one file."""

    file: str
    size_bytes: int
    error: Score
    latency: Latency


def score(session: Session, loader: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Run a session over every batch of a loader and count the wrong labels.

    Args:
        session: Maps images to logits (batch, classes), or to a tuple that starts with them.
        loader: Batches of images and of labels, shape (batch,).

    Raises:
        ValueError: If the loader is empty, or the logits are no numbers or not one row per image.

    >>> import torch
    >>> score(lambda x: x, [(torch.eye(3), torch.tensor([0, 1, 1]))])
    Score(wrong=1, total=3)
    """
    wrong = total = 0
    for images, labels in loader:
        outputs = session(images.numpy())
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple | list) else outputs)
        if logits.ndim != 2 or len(logits) != len(labels):
            raise ValueError(f"logits must be of shape ({len(labels)}, classes), got {logits.shape}, image {total}")
        if not np.isfinite(logits).all():
            raise ValueError(
                f"logits must be finite, got infinity or NaN among images {total} to {total + len(labels)}"
            )
        wrong += int((logits.argmax(axis=1) != labels.numpy()).sum())
        total += len(labels)
    if not total:
        raise ValueError("loader must yield at least one batch, got none")
    return Score(wrong, total)


def measure_artifacts(
    paths: Mapping[str, str | Path],
    *,
    loader: Iterable[tuple[Tensor, Tensor]],
    example_inputs: Sequence[Tensor],
    threads: int = 1,
    seconds: float = 20.0,
) -> dict[str, Measurement]:
    """Measure bytes, error and latency of files: loaded once, scored on the whole loader, timed side by side.

    Args:
        paths: Name to file (``.edge``, ``.onnx``, ``.pte``).
        loader: The test set, as for :func:`score`.
        example_inputs: Arguments of the network; only the first item of each batch is timed.
        threads: Of every runtime.
        seconds: About how long the timing of all files together may take.

    Raises:
        ValueError: If there is no file, or see :func:`score`.

    >>> measure_artifacts({}, loader=[], example_inputs=[])
    Traceback (most recent call last):
    ValueError: sessions must hold at least one session, got none
    """
    # A runtime that is not installed is only missed when one of its files is loaded.
    from lightning_edge.artifact import load_artifact

    sessions: dict[str, Any] = {name: load_artifact(path, threads=threads) for name, path in paths.items()}
    arrays = [np.ascontiguousarray(tensor[:1].numpy()) for tensor in example_inputs]
    latencies = time_sessions(sessions, arrays, seconds=seconds)
    return {
        name: Measurement(path.name, path.stat().st_size, score(sessions[name], loader), latencies[name])
        for name, path in ((name, Path(path)) for name, path in paths.items())
    }
