"""The packed file: writing, reading, running. Reading and running import numpy, zstandard and onnxruntime, no torch."""

from lightning_edge.artifact.inspecting import Inspection, TensorInfo, inspect
from lightning_edge.artifact.reading import read_tensors, unpack
from lightning_edge.artifact.session import InputInfo, Session, load_artifact
from lightning_edge.artifact.writing import PackReport, pack
from lightning_edge.functional.bytestream import EdgeFormatError

__all__ = [
    "EdgeFormatError",
    "InputInfo",
    "Inspection",
    "PackReport",
    "Session",
    "TensorInfo",
    "inspect",
    "load_artifact",
    "pack",
    "read_tensors",
    "unpack",
]
