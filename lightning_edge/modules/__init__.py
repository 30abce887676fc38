"""LightningModules."""

from lightning_edge.modules.classification import ClassificationModule
from lightning_edge.modules.distillation import DistillationModule
from lightning_edge.modules.distillation_terms import DistillationTerm
from lightning_edge.modules.teachers import MovingAverage, pretrained

__all__ = ["ClassificationModule", "DistillationModule", "DistillationTerm", "MovingAverage", "pretrained"]
