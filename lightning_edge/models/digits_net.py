"""A small convolutional network for 8 x 8 digits."""

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Map images of shape (batch, 1, 8, 8) to logits of shape (batch, 10); 42,898 parameters.

    Three blocks of convolution, batch norm and ReLU, then two linear layers: one of each kind of layer that pruning,
    sharing and quantization have to get right, and small enough for a demonstration on a CPU.

    Args:
        dropout: Probability with which an input of the last layer is dropped in training, in [0, 1).
        width: Factor of the channels and the hidden units, each rounded; 0.5 has 11,022 parameters.

    Raises:
        ValueError: If ``width`` leaves a layer without channels.

    >>> import torch
    >>> DigitsNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, *, dropout: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, hidden = (round(width * channels) for channels in (24, 32, 64, 64))
        if first < 1:
            raise ValueError(f"width must leave each layer a channel, got {width}")
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(third)
        self.fc1 = nn.Linear(third * 2 * 2, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))
        return logits
