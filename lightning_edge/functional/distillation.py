"""What a student is told to match of its teacher: losses over outputs, features, and relations between examples.

Each takes the student's tensor first, the teacher's second, and returns a scalar. It computes in float32 at least,
whatever it is given and under autocast too: differences of probabilities are smaller than what bfloat16 can tell. No
gradient flows into the teacher's, but for :func:`contrastive_loss`, whose embedding of it is trained.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-8  # what a norm or a mean distance is at least
_CONSTANT = 1e-4  # of its mean square: below, a variance is that of a constant

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def _in_float32(loss: Loss) -> Loss:
    """Return the loss, computed in float32 at least, without autocast."""

    @wraps(loss)
    def exact(student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own, other = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (student, teacher))
        with torch.autocast(student.device.type, enabled=False):
            return loss(own, other, *args, **kwargs)

    return cast(Loss, exact)


@_in_float32
def soft_target_loss(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Match softened class probabilities (Hinton et al. 2015, arXiv:1503.02531, sec. 2).

    Args:
        student: Logits, shape (batch, classes).
        teacher: Logits, same shape.
        temperature: Softening factor, > 0.

    Returns:
        Scalar KL divergence in nats, averaged over the batch, times ``temperature**2``.

    Raises:
        ValueError: If the shapes differ or are no matrices, or ``temperature`` is not positive.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> soft_target_loss(logits, logits, temperature=4.0).item()
    0.0
    """
    _check_logits(student, teacher)
    _check_positive("temperature", temperature)
    own = F.log_softmax(student / temperature, dim=1)
    want = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(own, want, reduction="batchmean", log_target=True) * temperature**2


@_in_float32
def decoupled_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Match how sure the teacher is of the label, and apart from it, how it ranks the other classes.

    Decoupled knowledge distillation (DKD, Zhao et al. 2022, arXiv:2203.08679, eq. 7). With ``alpha=1`` and ``beta`` the
    teacher's probability of the other classes, it is :func:`soft_target_loss`.

    Args:
        student: Logits, shape (batch, classes).
        teacher: Logits, same shape.
        labels: Class of each example, shape (batch,), integers.
        temperature: Softening factor, > 0.
        alpha: Weight of the binary part, label against the rest.
        beta: Weight of the part among the other classes.

    Returns:
        Scalar in nats, averaged over the batch, times ``temperature**2``.

    Raises:
        ValueError: If shapes or labels do not fit, or ``temperature`` is not positive.

    >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
    >>> decoupled_loss(logits, logits, torch.tensor([0])).item()
    0.0
    """
    _check_logits(student, teacher)
    _check_positive("temperature", temperature)
    classes = student.shape[1]
    if classes < 2:
        raise ValueError(f"student must have logits of two classes at least, got shape {tuple(student.shape)}")
    if labels.shape != student.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be {len(student)} integers, one of each row, got {labels.dtype} of {tuple(labels.shape)}: of"
            " tokens, flatten the labels like the logits"
        )
    labels = labels.long()
    if bool(((labels < 0) | (labels >= classes)).any()):
        wrong = labels[(labels < 0) | (labels >= classes)][:3].tolist()
        raise ValueError(
            f"labels must lie in [0, {classes}), got {wrong}: leave rows that are ignored out, of logits and labels"
        )
    own = F.log_softmax(student / temperature, dim=1)
    want = F.log_softmax(teacher.detach() / temperature, dim=1)
    is_label = F.one_hot(labels, classes).bool()
    target = F.kl_div(_binary(own, is_label), _binary(want, is_label), reduction="batchmean", log_target=True)
    rest = F.kl_div(_among(own, is_label), _among(want, is_label), reduction="batchmean", log_target=True)
    return (alpha * target + beta * rest) * temperature**2


@_in_float32
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match the teacher's features (FitNets, Romero et al. 2015, arXiv:1412.6550, eq. 3).

    Where we differ: the squared distance is averaged and divided by the variance of the teacher's features, so that a
    weight means the same at every layer of every network: 1 is as bad as to know nothing but the mean. Features that
    are all one number have no variance: they count by their square, zeros as they are.

    Args:
        student: Features of any shape; what a regressor makes of them if the widths differ.
        teacher: Features, same shape.

    Raises:
        ValueError: If the shapes differ.

    >>> hint_loss(torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]])).item()
    1.0
    """
    _check_shapes(student, teacher)
    wanted = teacher.detach()
    variance, square = wanted.var(correction=0), wanted.square().mean()
    scale = torch.where(variance > _CONSTANT * square, variance, square)
    return F.mse_loss(student, wanted) / torch.where(scale > 0, scale, 1.0)


@_in_float32
def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match where the network looks (attention transfer, Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. 2).

    A map is the sum of the squared channels, normalized; widths may differ. Where we differ: like in the authors' code,
    the squared distance is averaged over batch and positions.

    Args:
        student: Features, shape (batch, channels, *positions).
        teacher: Features, shape (batch, any channels, *same positions).

    Raises:
        ValueError: If batch or positions differ, or there are none.

    >>> attention_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 5, 3, 3)).item()
    0.0
    """
    shapes = (student.shape[0], *student.shape[2:]), (teacher.shape[0], *teacher.shape[2:])
    if shapes[0] != shapes[1] or student.ndim < 3:
        raise ValueError(
            "student and teacher must have shape (batch, channels, *positions) with equal batch and positions, got"
            f" {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    own, want = (F.normalize(features.square().sum(1).flatten(1)) for features in (student, teacher.detach()))
    return F.mse_loss(own, want)


@_in_float32
def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match which examples of a batch look alike (Tung and Mori 2019, arXiv:1907.09682, eq. 4).

    Args:
        student: Features, shape (batch, ...); widths and sizes may differ from the teacher's.
        teacher: Features, shape (batch, ...).

    Returns:
        Squared Frobenius distance of the row-normalized Gram matrices, over batch squared.

    Raises:
        ValueError: If the batches differ.

    >>> similarity_loss(torch.eye(2), 3 * torch.eye(2)).item()
    0.0
    """
    _check_batch(student, teacher)
    own, want = (F.normalize(_gram(features)) for features in (student, teacher.detach()))
    return F.mse_loss(own, want)


@_in_float32
def relational_loss(
    student: Tensor, teacher: Tensor, *, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    """Match distances and angles between examples (RKD, Park et al. 2019, arXiv:1904.05068, eqs. 6 and 9).

    Args:
        student: Features, shape (batch, ...); widths may differ from the teacher's.
        teacher: Features, shape (batch, ...).
        distance_weight: Weight of the distances of pairs, each over their mean.
        angle_weight: Weight of the cosines of the angles of triples.

    Returns:
        Scalar: Huber distances, averaged over pairs and over triples.

    Raises:
        ValueError: If the batches differ.

    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> round(relational_loss(points, 3 * points).item(), 6)
    0.0
    """
    _check_batch(student, teacher)
    own, want = (features.flatten(1) for features in (student, teacher.detach()))
    loss = own.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * F.smooth_l1_loss(_distances(own), _distances(want))
    if angle_weight:
        loss = loss + angle_weight * F.smooth_l1_loss(_angles(own), _angles(want))
    return loss


@_in_float32
def contrastive_loss(student: Tensor, teacher: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Tell the teacher's view of the same example from its views of others (CRD, Tian et al. 2020, arXiv:1910.10699).

    Where we differ: the other examples of the batch are the negatives, instead of a memory of many thousands, and the
    softmax over them (InfoNCE) replaces the binary estimator of their eq. 18; each side is contrasted with the other.

    Args:
        student: Embeddings, shape (batch, width).
        teacher: Embeddings, same shape, of the same examples.
        temperature: Of the softmax over cosines, > 0.

    Returns:
        Scalar in nats: ``log(batch)`` if nothing is known, near 0 if each example is found.

    Raises:
        ValueError: If the shapes differ, or ``temperature`` is not positive.

    >>> round(contrastive_loss(torch.eye(3), torch.eye(3), temperature=0.1).item(), 4)
    0.0001
    """
    _check_shapes(student, teacher)
    _check_positive("temperature", temperature)
    own, want = (F.normalize(features.flatten(1)) for features in (student, teacher))
    cosines = own @ want.T / temperature
    places = torch.arange(len(cosines), device=cosines.device)
    return (F.cross_entropy(cosines, places) + F.cross_entropy(cosines.T, places)) / 2


@_in_float32
def squared_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match values: logits (Ba and Caruana 2014, arXiv:1312.6184, eq. 1), a regression, an embedding.

    Args:
        student: Any shape.
        teacher: Same shape.

    Returns:
        Mean squared difference.

    Raises:
        ValueError: If the shapes differ.

    >>> squared_loss(torch.zeros(2), torch.tensor([1.0, 3.0])).item()
    5.0
    """
    _check_shapes(student, teacher)
    return F.mse_loss(student, teacher.detach())


@_in_float32
def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Match directions of embeddings, whatever their lengths.

    Args:
        student: Shape (..., width); of four or five dimensions (batch, channels, *positions).
        teacher: Same shape.

    Returns:
        Mean of ``1 - cosine``, in [0, 2].

    Raises:
        ValueError: If the shapes differ.

    >>> cosine_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    1.0
    """
    _check_shapes(student, teacher)
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1 if student.ndim > 3 else -1).mean()


def _binary(logs: Tensor, is_label: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of the label and of all others together."""
    label = logs[is_label]
    others = logs.masked_fill(is_label, float("-inf")).logsumexp(1)
    return torch.stack([label, others], dim=1)


def _among(logs: Tensor, is_label: Tensor) -> Tensor:
    """Return the logarithms of the probabilities of the other classes, given that it is one of them."""
    return F.log_softmax(logs[~is_label].view(len(logs), -1), dim=1)


def _gram(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return rows @ rows.T


def _distances(points: Tensor) -> Tensor:
    """Return the distances of all pairs over their mean, with a gradient of zero between equal points."""
    squared = (points.unsqueeze(0) - points.unsqueeze(1)).square().sum(2)
    apart = squared > 0
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.clamp_min(_SMALLEST)


def _angles(points: Tensor) -> Tensor:
    """Return the cosine of the angle at the middle example of every triple, shape (batch, batch, batch)."""
    directions = F.normalize(points.unsqueeze(0) - points.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    _check_shapes(student, teacher)
    if student.ndim != 2:
        raise ValueError(
            f"student must have shape (batch, classes), got {tuple(student.shape)}: flatten what is before classes"
        )


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _check_batch(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher) or student.ndim < 2:
        raise ValueError(
            "student and teacher must have shape (batch, ...) with equal batch, got"
            f" {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
