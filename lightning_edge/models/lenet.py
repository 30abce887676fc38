"""The two networks for MNIST on which compression is compared since Deep Compression (Han et al., arXiv:1510.00149)."""

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Map images of shape (batch, 1, 28, 28) to logits of shape (batch, 10): the LeNet-5 of the Caffe examples.

    431,080 parameters: 20 and 50 filters of 5 x 5, each followed by max pooling and no activation, then 500 hidden
    units. LeCun's network of 1998 has the same name and 60,000 parameters.

    Args:
        dropout: Probability with which an input of ``fc2`` is dropped in training, in [0, 1). Caffe's has none.

    >>> sum(p.numel() for p in LeNet5().parameters())
    431080
    """

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(500, 10)

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

    >>> sum(p.numel() for p in LeNet300().parameters())
    266610
    """

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(300, 100)
        self.dropout2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.dropout1(F.relu(self.fc1(images.flatten(1))))
        logits: Tensor = self.fc3(self.dropout2(F.relu(self.fc2(x))))
        return logits
