"""The few small networks that the recipes name: plain torch, exportable with a dynamic batch."""

from lightning_edge.models.digits_net import DigitsNet
from lightning_edge.models.lenet import LeNet5, LeNet300

__all__ = ["DigitsNet", "LeNet5", "LeNet300"]
