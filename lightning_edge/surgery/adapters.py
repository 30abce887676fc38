"""Small trained layers between features of different sizes; they are dropped when the student is done."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class FeatureAdapter(nn.Module):
    """Bring features to the width and the positions of others (the regressor of FitNets, arXiv:1412.6550, sec. 2.2).

    Features of four or five dimensions are (batch, channels, *positions): a 1x1 convolution changes the channels, an
    interpolation the positions. Others are (batch, ..., width): a linear layer. Where nothing differs nothing is done.

    Args:
        source: Shape of the features that come in.
        target: Shape that is wanted; neither batch counts.
        channels_first: Whether features of three dimensions are (batch, channels, positions), as of a ``Conv1d``, not
            (batch, tokens, width).

    Raises:
        ValueError: If the shapes differ in more than that.

    >>> import torch
    >>> FeatureAdapter((2, 8, 4, 4), (2, 16, 2, 2))(torch.zeros(3, 8, 4, 4)).shape
    torch.Size([3, 16, 2, 2])
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...], *, channels_first: bool = False) -> None:
        super().__init__()
        if len(source) != len(target) or len(source) < 2:
            raise ValueError(
                f"features must have equally many dimensions to be adapted, got shapes {source} and {target}"
            )
        self.positions = tuple(target[2:])
        self.has_positions = _has_positions(source, channels_first)
        width, wanted = (source[1], target[1]) if self.has_positions else (source[-1], target[-1])
        self.projection: nn.Module = nn.Identity()
        if width != wanted:
            self.projection = (
                _CONVOLUTIONS[len(source)](width, wanted, 1) if self.has_positions else nn.Linear(width, wanted)
            )
        if not self.has_positions and source[1:-1] != target[1:-1]:
            raise ValueError(
                f"features of shape (batch, ..., width) must differ in width alone, got {source} and {target}: where"
                " they are (batch, channels, positions), match the Conv1d itself"
            )

    def forward(self, features: Tensor, positions: Sequence[int] | None = None) -> Tensor:
        """Return the features in the target's width, at so many positions; default: the target's."""
        adapted: Tensor = self.projection(features)
        size = self.positions if positions is None else tuple(positions)
        if self.has_positions and adapted.shape[2:] != size:
            adapted = F.interpolate(adapted, size=size, mode="area")
        return adapted


class Projection(nn.Module):
    """Bring features of any shape to an embedding (CRD, Tian et al. 2020, arXiv:1910.10699, sec. 3.4).

    Positions are averaged first: shape (batch, channels, *positions) or (batch, tokens, width) to (batch, width).

    Args:
        source: Shape of the features.
        width: Of the embedding.
        channels_first: Of features of three dimensions, as in :class:`FeatureAdapter`.

    >>> import torch
    >>> Projection((2, 8, 4, 4), 128)(torch.zeros(3, 8, 4, 4)).shape
    torch.Size([3, 128])
    """

    def __init__(self, source: tuple[int, ...], width: int, *, channels_first: bool = False) -> None:
        super().__init__()
        self.has_positions = _has_positions(source, channels_first)
        self.linear = nn.Linear(source[1] if self.has_positions else source[-1], width)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings, shape (batch, width)."""
        if features.ndim > 2:
            features = features.flatten(2).mean(2) if self.has_positions else features.flatten(1, -2).mean(1)
        # A teacher's features are float32, whatever the numbers of the module that this layer is a part of.
        embeddings: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return embeddings


def _has_positions(shape: tuple[int, ...], channels_first: bool) -> bool:
    """Return whether the shape is (batch, channels, *positions), not (batch, ..., width)."""
    return len(shape) in (4, 5) or (len(shape) == 3 and channels_first)
