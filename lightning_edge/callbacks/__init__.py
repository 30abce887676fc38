"""Clocks: when, during a fit, which surgery is done. The only place that knows the Trainer."""

from lightning_edge.callbacks.calibration import PostTrainingQuantization
from lightning_edge.callbacks.channels import ChannelPruning
from lightning_edge.callbacks.export import ExportArtifacts
from lightning_edge.callbacks.history import History
from lightning_edge.callbacks.pruning import WeightPruning
from lightning_edge.callbacks.quantization import QuantizationAwareTraining
from lightning_edge.callbacks.resume import ExactResume
from lightning_edge.callbacks.sharing import WeightSharing

__all__ = [
    "ChannelPruning",
    "ExactResume",
    "ExportArtifacts",
    "History",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "WeightPruning",
    "WeightSharing",
]
