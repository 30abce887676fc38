"""The few small networks that the recipes name: plain torch, exportable with a dynamic batch."""

from lightning_edge.models.digits_net import DigitsNet
from lightning_edge.models.lenet import LeNet5, LeNet300
from lightning_edge.models.resnet import CifarResNet, ResNet20, ResNet56

__all__ = ["CifarResNet", "DigitsNet", "LeNet5", "LeNet300", "ResNet20", "ResNet56"]
