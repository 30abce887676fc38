"""The data modules that the recipes name."""

from lightning_edge.data.cifar10 import CIFAR10DataModule
from lightning_edge.data.digits import DigitsDataModule
from lightning_edge.data.mnist import MNISTDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule", "MNISTDataModule"]
