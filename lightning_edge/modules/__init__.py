"""LightningModules."""

from lightning_edge.modules.classification import ClassificationModule

__all__ = ["ClassificationModule"]
