"""Which options of WeightSharing go together."""

from collections.abc import Sequence

from lightning_edge.export.byte_budget import check_max_bytes
from lightning_edge.surgery.codebooks import Codebooks

GRADIENTS = ("mean", "sum")
IMPORTANCES = ("none", "gradients")


def epochs_of(at_epochs: Sequence[int]) -> tuple[int, ...]:
    """Return the epochs of the clusterings, each once, in order.

    Raises:
        ValueError: Unless they are a list of at least one whole number >= 0.

    >>> epochs_of([4, 2])
    (2, 4)
    """
    if isinstance(at_epochs, int | float | str):
        raise ValueError(f"at_epochs must be a list of epochs, got {at_epochs!r}: write [{at_epochs}]")
    if not at_epochs or not all(_is_whole(epoch) and epoch >= 0 for epoch in at_epochs):
        raise ValueError(f"at_epochs must name at least one epoch >= 0, a whole number, got {list(at_epochs)}")
    return tuple(sorted(set(at_epochs)))


def check_training(
    at_epochs: Sequence[int],
    books: Codebooks,
    gradient: str,
    importance: str,
    reassign_every: int | None,
    freeze_epoch: int | None,
) -> None:
    """Raise a ValueError unless the options say one way to train shared values.

    >>> check_training([1], Codebooks(), "mean", "none", None, None)
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {list(GRADIENTS)}, got {gradient!r}")
    if gradient == "sum" and books.channel_scale:
        raise ValueError("gradient must be 'mean' with channel_scale, got 'sum', which leaves the scales out: drop one")
    if importance not in IMPORTANCES:
        raise ValueError(f"importance must be one of {list(IMPORTANCES)}, got {importance!r}")
    if importance == "gradients" and at_epochs[0] == 0:
        raise ValueError(
            "importance must be 'none' for a clustering at epoch 0, got 'gradients', which are those of the epoch"
            f" before: take at_epochs={[1, *at_epochs[1:]]}"
        )
    if reassign_every is not None:
        _check_reassignment(books, gradient, reassign_every, freeze_epoch)
    elif freeze_epoch is not None:
        raise ValueError(f"freeze_epoch must be None without reassign_every, got {freeze_epoch}: the codes stay anyway")
    if freeze_epoch is not None and not (_is_whole(freeze_epoch) and freeze_epoch > at_epochs[-1]):
        raise ValueError(
            f"freeze_epoch must be a whole number above the last of at_epochs, {at_epochs[-1]}, got {freeze_epoch}:"
            " codes are trained from a clustering on"
        )


def _check_reassignment(books: Codebooks, gradient: str, reassign_every: int, freeze_epoch: int | None) -> None:
    if not _is_whole(reassign_every) or reassign_every < 1:
        raise ValueError(
            f"reassign_every must be a whole number >= 1 of optimizer steps, or None, got {reassign_every!r}"
        )
    if books.block > 1:
        raise ValueError(
            f"reassign_every must be None with block={books.block}, got {reassign_every}: codes of vectors stay between"
            " clusterings"
        )
    if gradient == "sum" and freeze_epoch is None:
        raise ValueError(
            "gradient must be 'mean' with reassign_every and no freeze_epoch, got 'sum': hidden weights learn from"
            " gradients of their own"
        )


def check_budget(max_bytes: int | None, books: Codebooks, reassign_every: int | None, freeze_epoch: int | None) -> None:
    """Raise a ValueError unless a budget of bytes can be met.

    >>> check_budget(5000, Codebooks(), None, None)
    """
    if max_bytes is None:
        return
    check_max_bytes(max_bytes)
    if books.rate:
        raise ValueError(f"rate must be 0 with max_bytes, got {books.rate}: it is found at every clustering")
    if books.block > 1:
        raise ValueError(
            f"max_bytes must be None with block={books.block}, got {max_bytes}: vectors have no rate to meet it"
        )
    if reassign_every is not None and freeze_epoch is None:
        raise ValueError(
            f"max_bytes must be None with reassign_every and no freeze_epoch, got {max_bytes}: codes that change to the"
            " end change the size; give a freeze_epoch"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
