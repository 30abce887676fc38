"""Small trained layers between features of different sizes; they are dropped when the student is done."""

import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}


class FeatureAdapter(nn.Module):
    """Bring features to the width and the positions of others (the regressor of FitNets, arXiv:1412.6550, sec. 2.2).

    Features of four or five dimensions are (batch, channels, *positions): a 1x1 convolution changes the channels, an
    interpolation the positions. Others are (batch, ..., width): a linear layer. Where nothing differs nothing is done.

    Args:
        source: Shape of the features that come in.
        target: Shape that is wanted; neither batch counts.

    Raises:
        ValueError: If the shapes differ in more than that.

    >>> import torch
    >>> FeatureAdapter((2, 8, 4, 4), (2, 16, 2, 2))(torch.zeros(3, 8, 4, 4)).shape
    torch.Size([3, 16, 2, 2])
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        if len(source) != len(target) or len(source) < 2:
            raise ValueError(
                f"features must have equally many dimensions to be adapted, got shapes {source} and {target}"
            )
        self.source, self.target = tuple(source[1:]), tuple(target[1:])
        self.is_image = len(source) in _CONVOLUTIONS
        width, wanted = (source[1], target[1]) if self.is_image else (source[-1], target[-1])
        self.projection: nn.Module = nn.Identity()
        if width != wanted:
            self.projection = (
                _CONVOLUTIONS[len(source)](width, wanted, 1) if self.is_image else nn.Linear(width, wanted)
            )
        if not self.is_image and source[1:-1] != target[1:-1]:
            raise ValueError(
                f"features of shape (batch, ..., width) must differ in width alone, got {source} and {target}"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return the features in the target's shape.

        Raises:
            ValueError: If they are not of the shape that the adapter was made for.
        """
        width = 0 if self.is_image else -1
        if features.shape[1:][width] != self.source[width]:
            raise ValueError(
                f"features must keep the width of {self.source[width]} that their adapter was made for, got"
                f" {features.shape[1:][width]}: channels of this layer were removed; exclude it from ChannelPruning"
            )
        adapted: Tensor = self.projection(features)
        if self.is_image and adapted.shape[2:] != self.target[1:]:
            adapted = F.interpolate(adapted, size=self.target[1:], mode="area")
        return adapted


class Projection(nn.Module):
    """Bring features of any shape to an embedding (CRD, Tian et al. 2020, arXiv:1910.10699, sec. 3.4).

    Positions are averaged first: shape (batch, channels, *positions) or (batch, tokens, width) to (batch, width).

    Args:
        source: Shape of the features.
        width: Of the embedding.

    >>> import torch
    >>> Projection((2, 8, 4, 4), 128)(torch.zeros(3, 8, 4, 4)).shape
    torch.Size([3, 128])
    """

    def __init__(self, source: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.is_image = len(source) in _CONVOLUTIONS
        self.linear = nn.Linear(source[1] if self.is_image else source[-1], width)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings, shape (batch, width)."""
        if features.ndim > 2:
            features = features.flatten(2).mean(2) if self.is_image else features.flatten(1, -2).mean(1)
        embeddings: Tensor = self.linear(features)
        return embeddings
