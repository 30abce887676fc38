"""Whether a file computes what the trained network computes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_edge.export.signature import named_tensors_of
from lightning_edge.surgery.calls import Arguments, as_arguments
from lightning_edge.surgery.capture import training_flags

_Array = np.ndarray[Any, Any]


class ArtifactMismatchError(RuntimeError):
    """A file does not compute what the network it was made from computes.

    Attributes:
        verification: What was found, where there was anything to count.
    """

    verification: "Verification | None" = None


@dataclass(frozen=True)
class Verification:
    """How a file's outputs compare with those of the trained network, over all rows of the data."""

    rows: int
    agreeing: int
    """Rows whose largest value is at the same place in both: the label, where the outputs are logits."""
    largest_difference: float
    """Of any two corresponding values; infinite if one of them is no number."""

    right: int | None = None
    """Rows whose label the file gets right; None without targets."""
    right_as_trained: int | None = None
    """Rows whose label the trained network gets right."""

    @property
    def agreement(self) -> float:
        """Fraction of the rows that agree, in [0, 1]."""
        return self.agreeing / self.rows

    def check(
        self,
        name: str,
        *,
        min_agreement: float = 0.99,
        max_difference: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Return if the file is close enough.

        Args:
            name: Name of the file, for the message.
            min_agreement: Smallest fraction of agreeing rows, in [0, 1]; 0.0 for outputs that are no logits.
            max_difference: Largest difference allowed; None for any finite one.
            tolerance: How many more rows the file may get wrong than the network, as a fraction of all; None for any.

        Raises:
            ArtifactMismatchError: If it is not.
            ValueError: If there is a ``tolerance`` and there were no targets.

        >>> Verification(rows=100, agreeing=99, largest_difference=0.25).check("model.onnx", min_agreement=0.99)
        """
        # Compared as counts: a quotient of two integers may lie an ulp below the fraction meant.
        enough = self.agreeing >= round(min_agreement * self.rows, 9)
        bound = float("inf") if max_difference is None else max_difference
        near = np.isfinite(self.largest_difference) and self.largest_difference <= bound
        if not (enough and near):
            allowed = "a finite difference" if max_difference is None else f"a difference of at most {max_difference:g}"
            raise self._mismatch(
                f"{name} must compute what the trained network computes ({min_agreement:.4g} of the labels, "
                f"{allowed}), got {self.agreeing}/{self.rows} labels and a largest difference of "
                f"{self.largest_difference:.3g}"
            )
        if tolerance is not None:
            self._check_drop(name, tolerance)

    def _mismatch(self, message: str) -> ArtifactMismatchError:
        error = ArtifactMismatchError(message)
        error.verification = self
        return error

    def _check_drop(self, name: str, tolerance: float) -> None:
        if self.right is None or self.right_as_trained is None:
            raise ValueError(
                f"tolerance must be None where batches have no targets, got {tolerance:g}: let the data give (inputs,"
                " labels), or a dict with 'labels'"
            )
        if self.right_as_trained - self.right > round(tolerance * self.rows, 9):
            raise self._mismatch(
                f"{name} must get at most {tolerance:.4g} of the labels more wrong than the trained network, got"
                f" {self.right}/{self.rows} right where the network has {self.right_as_trained}/{self.rows}"
            )

    def __str__(self) -> str:
        said = f"{self.agreeing}/{self.rows} labels as trained, largest difference {self.largest_difference:.3g}"
        if self.right is None:
            return said
        return f"{said}, {self.right}/{self.rows} right, as trained {self.right_as_trained}/{self.rows}"


@dataclass(frozen=True)
class LabelledInputs:
    """A batch of inputs, and the right label of each row."""

    inputs: Arguments
    labels: Tensor | None


def verify(session: Callable[..., Any], reference: nn.Module, batches: Iterable[Any]) -> Verification:
    """Run a file and the network it was made from on the same data, and compare every output.

    Args:
        session: The loaded file: arrays in, array or tuple of arrays out. Load it from a folder that holds it alone,
            or a second file that it silently opens goes unnoticed. Outputs of a dict are compared by name.
        reference: The trained network; of one that computes with fake-quantized numbers the int8 network, ``convert``.
            It runs in evaluation mode without gradients, and its modes are put back.
        batches: Inputs, batch first: a tensor, a tuple of several, a dict by name, or :class:`LabelledInputs`.

    Returns:
        The comparison. Labels are those of the first output, over its last dimension.

    Raises:
        ArtifactMismatchError: If the outputs differ in number, name or shape.
        ValueError: If there are no rows.

    >>> verify(lambda x: 2 * x, nn.Identity(), [torch.eye(3)])
    Verification(rows=3, agreeing=3, largest_difference=1.0, right=None, right_as_trained=None)
    """
    total = _Counts()
    with training_flags(reference, False), torch.no_grad():
        for batch in batches:
            given = batch if isinstance(batch, LabelledInputs) else LabelledInputs(_arguments(reference, batch), None)
            total.add(_outputs(session, reference, given.inputs), given.labels)
    if not total.rows:
        raise ValueError("batches must hold at least one row to compare the file with the network, got none")
    right = (total.right, total.right_as_trained) if total.labelled == total.rows else (None, None)
    return Verification(total.rows, total.agreeing, total.largest_difference, *right)


@dataclass
class _Counts:
    """What is added up over the batches."""

    rows: int = 0
    agreeing: int = 0
    labelled: int = 0
    right: int = 0
    right_as_trained: int = 0
    largest_difference: float = 0.0

    def add(self, outputs: list[tuple[_Array, _Array]], labels: Tensor | None) -> None:
        """Add pairs of what the network and the file computed for a batch."""
        self.largest_difference = max(self.largest_difference, *(_difference(*pair) for pair in outputs))
        expected, got = (np.atleast_2d(value).argmax(axis=-1).reshape(-1) for value in outputs[0])
        self.rows += expected.size
        self.agreeing += int((expected == got).sum())
        if labels is not None and labels.numel() == expected.size:
            truth = labels.cpu().numpy().reshape(-1)
            self.labelled += truth.size
            self.right += int((got == truth).sum())
            self.right_as_trained += int((expected == truth).sum())


def _arguments(reference: nn.Module, batch: Any) -> Arguments:
    inputs = batch if isinstance(batch, tuple | Mapping) else (batch,)
    return as_arguments(reference, inputs, argument="a batch")


def _outputs(session: Callable[..., Any], reference: nn.Module, inputs: Arguments) -> list[tuple[_Array, _Array]]:
    """Return what the network and the file compute, output by output."""
    expected = {
        name: value.cpu().numpy() for name, value in named_tensors_of(reference(*inputs, **inputs.named)).items()
    }
    values = session(*(np.ascontiguousarray(value.cpu().numpy()) for value in inputs.tensors))
    arrays = [np.asarray(value) for value in (values if isinstance(values, list | tuple) else [values])]
    names = list(expected)
    if not any(name.isdigit() for name in names):  # keys of a dict
        names = list(getattr(session, "outputs", names))
    got = dict(zip(names, arrays, strict=False))
    shapes = [{name: value.shape for name, value in side.items()} for side in (expected, got)]
    if shapes[0] != shapes[1] or len(arrays) != len(expected):
        raise ArtifactMismatchError(
            f"the file must give outputs of shapes {shapes[0]}, like the network, got {shapes[1]}"
        )
    return [(value, got[name]) for name, value in expected.items()]


def _difference(expected: _Array, got: _Array) -> float:
    if not expected.size:
        return 0.0
    largest = float(np.abs(expected.astype(np.float64) - got.astype(np.float64)).max())
    return float("inf") if np.isnan(largest) else largest
