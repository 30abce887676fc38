"""The few small networks that the recipes name: plain torch, exportable with a dynamic batch."""

from lightning_edge.models.digits_net import DigitsNet
from lightning_edge.models.lenet import LeNet5, LeNet300
from lightning_edge.models.resnet import CifarResNet, ResNet8, ResNet20, ResNet56

__all__ = ["CifarResNet", "DigitsNet", "LeNet5", "LeNet300", "ResNet8", "ResNet20", "ResNet56"]
