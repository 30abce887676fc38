"""The two networks for MNIST on which compression is compared since Deep Compression (Han et al., arXiv:1510.00149)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Map images of shape (batch, 1, 28, 28) to logits of shape (batch, 10): the LeNet-5 of the Caffe examples.

    431,080 parameters: 20 and 50 filters of 5 x 5, each followed by max pooling and no activation, then 500 hidden
    units. LeCun's network of 1998 has the same name and 60,000 parameters.

    Args:
        dropout: Probability with which an input of ``fc2`` is dropped in training, in [0, 1). Caffe's has none.
        width: Factor of the filters and the hidden units, each rounded.

    Raises:
        ValueError: If ``width`` leaves a layer without filters.

    >>> sum(p.numel() for p in LeNet5().parameters())
    431080
    """

    def __init__(self, *, dropout: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = (round(width * count) for count in (20, 50, 500))
        if first < 1:
            raise ValueError(f"width must leave each layer a filter, got {width}")
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(self.conv1(images), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))
        return logits


class LeNet300(nn.Module):
    """Map images of shape (batch, 1, 28, 28) to logits of shape (batch, 10): LeNet-300-100, 266,610 parameters.

    Args:
        dropout: Probability with which an input of ``fc2`` or ``fc3`` is dropped in training, in [0, 1).
        hidden: Units of the two hidden layers; 1200 and 1200 are those of the teacher of Hinton et al. 2015
            (arXiv:1503.02531), section 3.

    Raises:
        ValueError: If there are not two hidden layers.

    >>> sum(p.numel() for p in LeNet300().parameters())
    266610
    """

    def __init__(self, *, dropout: float = 0.0, hidden: Sequence[int] = (300, 100)) -> None:
        super().__init__()
        if len(hidden) != 2 or min(hidden) < 1:
            raise ValueError(f"hidden must be the units of two layers, got {list(hidden)}")
        first, second = hidden
        self.fc1 = nn.Linear(28 * 28, first)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(first, second)
        self.dropout2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.dropout1(F.relu(self.fc1(images.flatten(1))))
        logits: Tensor = self.fc3(self.dropout2(F.relu(self.fc2(x))))
        return logits
