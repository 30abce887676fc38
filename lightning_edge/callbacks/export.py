"""Write the files that ship, and run each before the fit is called a success."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_edge.artifact import load_artifact
from lightning_edge.callbacks.inputs import call_in_step, check_has_forward, labels_of
from lightning_edge.export import export
from lightning_edge.export.verification import ArtifactMismatchError, LabelledInputs, Verification, verify
from lightning_edge.surgery.calls import Arguments
from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.copying import copied
from lightning_edge.surgery.deadunits import DeadUnitsReport, remove_dead_units_
from lightning_edge.surgery.quantization import convert
from lightning_edge.surgery.selection import find_network

FORMATS = ("edge", "onnx", "pte")
_INTEGER_AGREEMENT, _FLOAT_AGREEMENT = 0.999, 0.99


class ExportArtifacts(L.Callback):
    """Export the trained network at the end of the fit, and check every file in the runtime that will run it.

    Units that pruning left without an input or without an output are removed first, from a copy of the network: weight
    pruning too ends in a smaller and faster file. On rank zero each file is written into a folder that holds it alone,
    run there on the whole validation data, and compared with the trained network, of a quantized one with the integer
    graph that it converts to; only then is it moved to ``folder``. The inputs are those that ``validation_step`` calls
    the network with, by position, by name or nested. A file that disagrees, or cannot be loaded, stays beside it as
    ``NAME.rejected.SUFFIX`` with a report, ``NAME.rejected.SUFFIX.json``, and every rank raises. A run that is resumed
    from its finished checkpoint exports again, to the same bytes.

    Args:
        folder: Where ``NAME.SUFFIX`` of each format goes; made when missing.
        formats: ``"edge"`` (packed), ``"onnx"`` (onnxruntime), ``"pte"`` (ExecuTorch, needs the extra ``executorch``).
        name: Name of the files without suffix.
        min_agreement: Smallest fraction of validation rows whose label must be that of the trained network, in [0, 1];
            None for 0.999 of an integer network and 0.99 of any other.
        tolerance: How much of the validation accuracy a file may lose against the trained network, a fraction; None for
            any. The labels are those of ``(inputs, labels)``, or what a dict has as label(s), target(s) or y.
        remove_dead_units: Remove dead units before the export; see ``remove_dead_units_``.
        round_small: Round biases, norms and shared values to float16 in the packed file; see ``export``.
        adaptive: Adaptive contexts in the packed file: smaller, and slower to load; see ``export``.
        recipe_hash: What the packed file says about the settings that made it.
        network: Dotted path of the network inside the LightningModule; see ``surgery.selection.network_path``.

    Raises:
        ValueError: If a format is unknown; at ``setup``, if there is no validation data or ExecuTorch is missing.
        ArtifactMismatchError: At the end of the fit, if a file disagrees with the trained network.

    >>> ExportArtifacts("out", formats=["edge"]).formats
    ('edge',)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        formats: Sequence[str] = ("edge", "onnx"),
        name: str = "model",
        min_agreement: float | None = None,
        tolerance: float | None = None,
        remove_dead_units: bool = True,
        round_small: bool = True,
        adaptive: bool = True,
        recipe_hash: str = "",
        network: str | None = None,
    ) -> None:
        unknown = [suffix for suffix in formats if suffix not in FORMATS]
        if unknown or not formats or isinstance(formats, str):
            raise ValueError(f"formats must be a list of some of {list(FORMATS)}, got {formats!r}")
        for argument, value in (("min_agreement", min_agreement), ("tolerance", tolerance)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{argument} must lie in [0, 1], a fraction of the rows, got {value}")
        self.folder, self.formats, self.name = Path(folder), tuple(formats), name
        self.min_agreement, self.tolerance = min_agreement, tolerance
        self.recipe_hash, self.network = recipe_hash, network
        self.remove_dead_units, self.round_small, self.adaptive = remove_dead_units, round_small, adaptive
        self.dead_units: DeadUnitsReport | None = None
        """After the fit, on rank zero: which units were removed before the export."""
        self.exported: nn.Module | None = None
        """After the fit, on rank zero: the network that the files hold."""
        self.verifications: dict[str, Verification] = {}
        """After the fit, on rank zero: how each format compared with the trained network."""

    def check(self, network: nn.Module, *, max_epochs: float) -> None:
        """Raise a ValueError if a format needs what is not installed."""
        check_has_forward(network)
        if "pte" in self.formats and find_spec("executorch") is None:
            raise ValueError('formats must not hold "pte" without ExecuTorch: pip install "lightning-edge[executorch]"')

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before any training, what would fail at its end."""
        if stage != "fit":
            return
        self.check(find_network(pl_module, self.network), max_epochs=trainer.max_epochs or 0)
        if not trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
            raise ValueError("fit must have validation data, on which ExportArtifacts checks the files, got none")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export and check on rank zero; what it finds is raised on every rank."""
        if getattr(trainer, "fast_dev_run", False):
            return
        failure: list[Any] = [None]
        if trainer.is_global_zero:
            try:
                self._export(trainer, pl_module)
            except Exception as error:
                if trainer.world_size == 1:
                    raise
                failure = [error]
        if trainer.world_size > 1:
            # The strategy is torn down by now, its process group is not.
            told = [None if failure[0] is None else f"{type(failure[0]).__name__} on rank 0: {failure[0]}"]
            torch.distributed.broadcast_object_list(told, src=0)
            if told[0] is not None:
                raise failure[0] or ArtifactMismatchError(told[0])

    @torch.no_grad()
    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = find_network(pl_module, self.network)
        was_training = network.training
        network.eval()
        try:
            example = next(self._batches(trainer, pl_module, network)).inputs
            self.folder.mkdir(parents=True, exist_ok=True)
            self.exported = self._alive(network, example)
            for suffix in self.formats:
                self._export_one(suffix, trainer, pl_module, example)
        finally:
            network.train(was_training)

    def _alive(self, network: nn.Module, example: Arguments) -> nn.Module:
        """Return a copy of the network without its dead units."""
        if not self.remove_dead_units:
            return network
        if example.named or not all(isinstance(value, Tensor) for value in example):
            rank_zero_info("dead units stay: they are looked for in networks that take tensors by position alone")
            return network
        alive = copied(network)
        with torch.enable_grad():  # tracing needs it
            self.dead_units = remove_dead_units_(alive, example_inputs=(*example.first(2),))
        if self.dead_units.count:
            rank_zero_info(f"dead units removed: {self.dead_units.count}, {dict(self.dead_units.removed)}")
        return alive

    def _export_one(self, suffix: str, trainer: L.Trainer, pl_module: L.LightningModule, example: Arguments) -> None:
        network = find_network(pl_module, self.network)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as alone:
            path = Path(alone) / f"{self.name}.{suffix}"
            assert self.exported is not None
            export(
                self.exported,
                path,
                example_inputs=example,
                round_small=self.round_small,
                adaptive=self.adaptive,
                recipe_hash=self.recipe_hash,
            )
            try:
                self.verifications[suffix] = self._verified(path, network, self._batches(trainer, pl_module, network))
            except Exception as error:
                self._reject(path, suffix, error)
                raise
            target = path.replace(self.folder / path.name)
        rank_zero_info(f"{target}: {target.stat().st_size:,} bytes, {self.verifications[suffix]}")

    def _verified(self, path: Path, network: nn.Module, batches: Iterator[LabelledInputs]) -> Verification:
        is_integer = captured_of(network) is not None
        verification = verify(load_artifact(path), convert(network) if is_integer else network, batches)
        least = self.min_agreement
        if least is None:
            least = _INTEGER_AGREEMENT if is_integer else _FLOAT_AGREEMENT
        verification.check(path.name, min_agreement=least, tolerance=self.tolerance)
        return verification

    def _reject(self, path: Path, suffix: str, error: Exception) -> None:
        """Keep the file aside, and beside it what is wrong with it."""
        kept = path.replace(self.folder / f"{self.name}.rejected.{suffix}")
        found = getattr(error, "verification", None)
        report = {"reason": str(error), "size_bytes": kept.stat().st_size, **({} if found is None else asdict(found))}
        kept.with_name(f"{kept.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def _batches(
        self, trainer: L.Trainer, pl_module: L.LightningModule, network: nn.Module
    ) -> Iterator[LabelledInputs]:
        """Yield what the network is called with for the whole validation data, not this rank's share; and labels."""
        loaders = trainer.fit_loop.epoch_loop.val_loop._data_source.dataloader()
        step = "validation_step" if is_overridden("validation_step", pl_module) else "training_step"
        device = next(network.parameters()).device
        with torch.random.fork_rng(devices=[]):
            for index, loader in enumerate(loaders if isinstance(loaders, list | tuple) else [loaders]):
                for batch in loader:
                    moved = pl_module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=index)
                    yield LabelledInputs(call_in_step(pl_module, network, step, moved, loader=index), labels_of(moved))
