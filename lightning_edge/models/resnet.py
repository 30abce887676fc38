"""Residual networks for CIFAR-10: of He et al. 2015 (arXiv:1512.03385), section 4.2, and of MLPerf Tiny."""

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to the input.

    The shortcut has no parameters (option A): where the block has ``stride`` 2, every second row and column of the
    input is taken, and the channels that it lacks are zero, half of them before and half behind its own.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least ``in_channels``.
        stride: Of the first convolution, 1 or 2.

    >>> import torch
    >>> BasicBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.missing_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (batch, out_channels, height / stride, width / stride)."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the input in the shape of the output."""
        if self.stride == 1 and not self.missing_channels:
            return x
        before = self.missing_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing_channels - before))


class ProjectedBlock(BasicBlock):
    """A basic block whose shortcut is a 1 x 1 convolution where the width or the size changes (option B).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and of the shortcut, 1 or 2.

    >>> import torch
    >>> ProjectedBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride=stride)
        changes = stride != 1 or self.missing_channels
        self.projection = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes else nn.Identity()
        )

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the input in the shape of the output."""
        projected: Tensor = self.projection(x)
        return projected


class CifarResNet(nn.Module):
    """Map images of shape (batch, 3, 32, 32) to logits of shape (batch, num_classes): 6 n + 2 layers.

    Three stages of ``blocks`` basic blocks with 16, 32 and 64 channels, then average pooling and one linear layer. The
    names of the modules are those of the published weights of akamaster/pytorch_resnet_cifar10.

    Args:
        blocks: Blocks of each stage, n.
        num_classes: How many logits.
        block: Class of the blocks.

    >>> sum(p.numel() for p in CifarResNet(blocks=9).parameters())
    853018
    """

    def __init__(self, *, blocks: int, num_classes: int = 10, block: type[BasicBlock] = BasicBlock) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.conv1 = nn.Conv2d(3, _STAGES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STAGES[0])
        stages = []
        channels = _STAGES[0]
        for width in _STAGES:
            first = block(channels, width, stride=width // channels)
            stages.append(nn.Sequential(first, *(block(width, width) for _ in range(blocks - 1))))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class ResNet20(CifarResNet):
    """ResNet-20 for CIFAR-10, 269,722 parameters.

    >>> sum(p.numel() for p in ResNet20().parameters())
    269722
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__(blocks=3, num_classes=num_classes)


class ResNet56(CifarResNet):
    """ResNet-56 for CIFAR-10, 853,018 parameters.

    >>> sum(p.numel() for p in ResNet56().parameters())
    853018
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__(blocks=9, num_classes=num_classes)


class ResNet8(CifarResNet):
    """ResNet-8 of MLPerf Tiny's image classification (Banbury et al. 2021, arXiv:2106.07597), 77,850 parameters.

    One block of each width, with a 1x1 convolution as the shortcut where it changes. Where we differ from the
    reference: convolutions have no biases, which the batch norms behind them have already.

    Args:
        num_classes: How many logits.

    >>> sum(p.numel() for p in ResNet8().parameters())
    77850
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__(blocks=1, num_classes=num_classes, block=ProjectedBlock)
