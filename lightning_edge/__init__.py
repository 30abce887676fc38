"""Compress networks for edge devices: PyTorch Lightning callbacks, functions, and one small verified file.

Names resolve on first use (PEP 562), so that importing this package imports neither torch nor lightning: on a device
``from lightning_edge import load_artifact`` needs numpy, onnxruntime and zstandard alone.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from lightning_edge.artifact import load_artifact, pack, unpack
    from lightning_edge.callbacks.calibration import PostTrainingQuantization
    from lightning_edge.callbacks.channels import ChannelPruning
    from lightning_edge.callbacks.export import ExportArtifacts
    from lightning_edge.callbacks.pruning import WeightPruning
    from lightning_edge.callbacks.quantization import QuantizationAwareTraining
    from lightning_edge.callbacks.resume import ExactResume
    from lightning_edge.callbacks.sharing import WeightSharing
    from lightning_edge.export import export
    from lightning_edge.modules.distillation import DistillationModule
    from lightning_edge.modules.distillation_terms import DistillationTerm
    from lightning_edge.surgery.batchnorm_folding import fold_batch_norms_
    from lightning_edge.surgery.batchnorm_statistics import reestimate_batch_norms_
    from lightning_edge.surgery.bias_correction import correct_bias_
    from lightning_edge.surgery.channels import slim_channels_
    from lightning_edge.surgery.deadunits import remove_dead_units_
    from lightning_edge.surgery.equalization import equalize_
    from lightning_edge.surgery.post_training import quantize
    from lightning_edge.surgery.pruning import prune_
    from lightning_edge.surgery.quantization import release_
    from lightning_edge.surgery.quantization_sensitivity import layers_to_keep, quantization_sensitivity
    from lightning_edge.surgery.sensitivity import sensitivity
    from lightning_edge.surgery.sharing import share_weights_
    from lightning_edge.surgery.widths import load_widths_

__version__ = "0.1.0"

__all__ = [
    "ChannelPruning",
    "DistillationModule",
    "DistillationTerm",
    "ExactResume",
    "ExportArtifacts",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "WeightPruning",
    "WeightSharing",
    "__version__",
    "correct_bias_",
    "equalize_",
    "export",
    "fold_batch_norms_",
    "layers_to_keep",
    "load_artifact",
    "load_widths_",
    "pack",
    "prune_",
    "quantization_sensitivity",
    "quantize",
    "reestimate_batch_norms_",
    "release_",
    "remove_dead_units_",
    "sensitivity",
    "share_weights_",
    "slim_channels_",
    "unpack",
]

_HOMES = {
    "ChannelPruning": "callbacks.channels",
    "DistillationModule": "modules.distillation",
    "DistillationTerm": "modules.distillation_terms",
    "ExactResume": "callbacks.resume",
    "ExportArtifacts": "callbacks.export",
    "PostTrainingQuantization": "callbacks.calibration",
    "QuantizationAwareTraining": "callbacks.quantization",
    "WeightPruning": "callbacks.pruning",
    "WeightSharing": "callbacks.sharing",
    "correct_bias_": "surgery.bias_correction",
    "equalize_": "surgery.equalization",
    "fold_batch_norms_": "surgery.batchnorm_folding",
    "layers_to_keep": "surgery.quantization_sensitivity",
    "load_artifact": "artifact",
    "load_widths_": "surgery.widths",
    "pack": "artifact",
    "prune_": "surgery.pruning",
    "quantization_sensitivity": "surgery.quantization_sensitivity",
    "quantize": "surgery.post_training",
    "reestimate_batch_norms_": "surgery.batchnorm_statistics",
    "release_": "surgery.quantization",
    "remove_dead_units_": "surgery.deadunits",
    "sensitivity": "surgery.sensitivity",
    "share_weights_": "surgery.sharing",
    "slim_channels_": "surgery.channels",
    "unpack": "artifact",
}


class _ExportPackage(ModuleType):
    """The subpackage ``export`` that can also be called: as the public function of the same name."""

    def __call__(
        self,
        module: "nn.Module",
        path: "str | Path",
        *,
        example_inputs: "tuple[Any, ...] | Mapping[str, Any]",
        round_small: bool = True,
        adaptive: bool = True,
        recipe_hash: str = "",
    ) -> "Path":
        written: Path = self.export(
            module,
            path,
            example_inputs=example_inputs,
            round_small=round_small,
            adaptive=adaptive,
            recipe_hash=recipe_hash,
        )
        return written


class _Package(ModuleType):
    """This package: whoever imports its subpackage ``export``, the name ``export`` stays callable."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a subpackage in its parent, and so hides a function of the same name for good.
        if name == "export" and isinstance(value, ModuleType):
            value.__class__ = _ExportPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module(f"{__name__}.export")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
