"""Whether a file computes what the trained network computes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ArtifactMismatchError(RuntimeError):
    """A file does not compute what the network it was made from computes."""


@dataclass(frozen=True)
class Verification:
    """How a file's outputs compare with those of the trained network, over all rows of the data."""

    rows: int
    agreeing: int
    """Rows whose largest value is at the same place in both: the label, where the outputs are logits."""
    largest_difference: float
    """Of any two corresponding values; infinite if one of them is no number."""

    @property
    def agreement(self) -> float:
        """Fraction of the rows that agree, in [0, 1]."""
        return self.agreeing / self.rows

    def check(self, name: str, *, min_agreement: float = 0.99, max_difference: float | None = None) -> None:
        """Return if the file is close enough.

        Args:
            name: Name of the file, for the message.
            min_agreement: Smallest fraction of agreeing rows, in [0, 1]; 0.0 for outputs that are no logits.
            max_difference: Largest difference allowed; None for any finite one.

        Raises:
            ArtifactMismatchError: If it is not.

        >>> Verification(rows=100, agreeing=99, largest_difference=0.25).check("model.onnx", min_agreement=0.99)
        """
        # Compared as counts: a quotient of two integers may lie an ulp below the fraction meant.
        enough = self.agreeing >= round(min_agreement * self.rows, 9)
        bound = float("inf") if max_difference is None else max_difference
        near = np.isfinite(self.largest_difference) and self.largest_difference <= bound
        if not (enough and near):
            allowed = "a finite difference" if max_difference is None else f"a difference of at most {max_difference:g}"
            raise ArtifactMismatchError(
                f"{name} must compute what the trained network computes ({min_agreement:.4g} of the labels, "
                f"{allowed}), got {self.agreeing}/{self.rows} labels and a largest difference of "
                f"{self.largest_difference:.3g}"
            )

    def __str__(self) -> str:
        return f"{self.agreeing}/{self.rows} labels as trained, largest difference {self.largest_difference:.3g}"


def verify(
    session: Callable[..., Any], reference: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> Verification:
    """Run a file and the network it was made from on the same data, and compare every output.

    Args:
        session: The loaded file: arrays in, array or tuple of arrays out. Load it from a folder that holds it alone,
            or a second file that it silently opens goes unnoticed.
        reference: The trained network. It runs in evaluation mode without gradients, and its modes are put back.
        batches: Inputs, batch first; a tuple for several inputs.

    Returns:
        The comparison. Labels are those of the first output, over its last dimension.

    Raises:
        ArtifactMismatchError: If the outputs differ in number or shape.
        ValueError: If there are no rows.

    >>> verify(lambda x: 2 * x, nn.Identity(), [torch.eye(3)])
    Verification(rows=3, agreeing=3, largest_difference=1.0)
    """
    flags = {module: module.training for module in reference.modules()}
    reference.eval()
    rows = agreeing = 0
    largest = 0.0
    try:
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            with torch.no_grad():
                expected = _arrays(reference(*inputs))
            got = _arrays(session(*(np.ascontiguousarray(value.cpu().numpy()) for value in inputs)))
            _check_shapes(expected, got)
            largest = max(largest, *(_difference(*pair) for pair in zip(expected, got, strict=True)))
            labels, theirs = (np.atleast_2d(outputs[0]).argmax(axis=-1).reshape(-1) for outputs in (expected, got))
            rows += labels.size
            agreeing += int((labels == theirs).sum())
    finally:
        for module, flag in flags.items():
            module.training = flag
    if not rows:
        raise ValueError("batches must hold at least one row to compare the file with the network, got none")
    return Verification(rows=rows, agreeing=agreeing, largest_difference=largest)


def _arrays(outputs: Any) -> list[np.ndarray[Any, Any]]:
    values = outputs if isinstance(outputs, list | tuple) else [outputs]
    return [value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in values]


def _check_shapes(expected: list[np.ndarray[Any, Any]], got: list[np.ndarray[Any, Any]]) -> None:
    shapes = [value.shape for value in expected], [value.shape for value in got]
    if shapes[0] != shapes[1]:
        raise ArtifactMismatchError(
            f"the file must give outputs of shapes {shapes[0]}, like the network, got {shapes[1]}"
        )


def _difference(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    if not expected.size:
        return 0.0
    largest = float(np.abs(expected.astype(np.float64) - got.astype(np.float64)).max())
    return float("inf") if np.isnan(largest) else largest
