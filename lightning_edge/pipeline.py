"""A run: train the dense baseline, compress it in one fit, measure every file, report. Finished stages are skipped."""

import logging
import shlex
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from lightning_edge.callbacks import ExportArtifacts
from lightning_edge.callbacks.base import callbacks_of, check_order, check_overlap, compressing
from lightning_edge.config import dense_stage, recipe_hash, teacher_stage
from lightning_edge.data.images import ImageDataModule
from lightning_edge.export import export
from lightning_edge.functional.energy import MacType
from lightning_edge.modules import DistillationModule
from lightning_edge.report import (
    EpochRecord,
    Report,
    environment,
    footprint,
    measure_artifacts,
    of_integers,
    print_table,
    report_row,
    write_report,
)
from lightning_edge.surgery.capture import training_flags
from lightning_edge.surgery.captured import captured_of
from lightning_edge.surgery.quantization import convert
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.weights import load_weights_
from lightning_edge.surgery.widths import changed_widths, rebuild_, widths_of

_BASELINE, _TEACHER, _LAST = "baseline.ckpt", "teacher.ckpt", "last.ckpt"


def run(cfg: DictConfig, folder: Path) -> None:
    """Run all stages of a configuration in ``folder``, or those that an interrupted run left open.

    Writes ``baseline.ckpt``, ``last.ckpt``, the artefacts, and ``report.json``, ``report.md`` and ``report.html``.

    Args:
        cfg: As :func:`lightning_edge.config.compose` returns it, with ``output`` filled in.
        folder: The run's folder; what is finished there is not done again.

    Raises:
        ValueError: If a setting cannot work; said before any training.
        FileNotFoundError: If data or the baseline are not there.
    """
    _quiet()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if "export" in cfg.callbacks:
        cfg.callbacks.export.recipe_hash = recipe_hash(cfg)
    dense_cfg, teacher_cfg = dense_stage(cfg), teacher_stage(cfg)
    for stage in (dense_cfg, cfg, *([] if teacher_cfg is None else [teacher_cfg])):
        _check(stage)
    _check_folder(cfg, folder)
    dense = _trained(dense_cfg, folder / _BASELINE, stage="dense baseline")
    if teacher_cfg is not None:
        _trained(teacher_cfg, folder / _TEACHER, stage="teacher")
    if cfg.get("sensitivity") is not None:
        # Of the trainer's own files and bars there would be one for each of the many validations.
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = instantiate(cfg.trainer, callbacks=[], **quiet)
        instantiate(cfg.sensitivity).run(dense, instantiate(cfg.data), trainer, folder)
        return
    start = dense if cfg.start == "dense" else None
    trainer, compressed, data = _fit(cfg, folder / _LAST, stage="compression", start=start)
    if trainer.is_global_zero and "export" in cfg.callbacks:
        _report(cfg, folder, trainer, dense=dense, compressed=compressed, data=data)


def _quiet() -> None:
    """Leave the console to the progress bar and the table; Lightning advertises and explains itself otherwise."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", message="The number of training batches .* is smaller than the logging interval.*"
    )


def _check(cfg: DictConfig) -> None:
    """Build everything once and let it object, so that nothing is trained for a mistake that shows at its end."""
    model = _taught(cfg, instantiate(cfg.model), reads=False)
    data = instantiate(cfg.data)
    if isinstance(data, ImageDataModule):
        _check_images(find_network(model), data)
    trainer = instantiate(cfg.trainer, callbacks=list(instantiate(cfg.callbacks).values()), logger=False)
    if isinstance(model, DistillationModule) and trainer.max_epochs != -1:
        model.check(epochs=trainer.max_epochs)
    looking = [] if cfg.get("sensitivity") is None else [instantiate(cfg.sensitivity)]
    for callback in [*callbacks_of(trainer), *looking]:
        if hasattr(callback, "check"):
            callback.check(find_network(model, callback.network), max_epochs=trainer.max_epochs)
    check_order(compressing(trainer))
    check_overlap(compressing(trainer), model)


@torch.no_grad()
def _check_images(network: nn.Module, data: ImageDataModule) -> None:
    with training_flags(network, False):
        try:
            network(data.example_input)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model must take images of the data's shape {data.input_shape}, got {type(network).__name__}, which"
                f" does not ({reason}): choose another model= or data="
            ) from error


@rank_zero_only
def _check_folder(cfg: DictConfig, folder: Path) -> None:
    """Refuse to mix a new run with an old one, whose finished stages would silently be taken for its own."""
    names = (_BASELINE, _TEACHER, _LAST, f"baseline/{_LAST}", f"teacher/{_LAST}")
    old = [name for name in names if (folder / name).exists()]
    if old and cfg.resume is None:
        raise ValueError(
            f"hydra.run.dir must be a new folder, got {folder}, which holds {old[0]}: go on with that run by"
            f" lightning-edge resume={folder}, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _trained(cfg: DictConfig, checkpoint: Path, *, stage: str) -> L.LightningModule:
    """Return a stage's trained model: from its checkpoint, from the file that the user names, or trained now."""
    if cfg.baseline is not None and not checkpoint.exists():
        given = Path(cfg.baseline).expanduser()
        if not given.is_file():
            raise FileNotFoundError(f"baseline must be a checkpoint file, got {str(given)!r}, which is none")
        model = _load(instantiate(cfg.model), given)
        _copy(given, checkpoint)
        return model
    if not checkpoint.exists():
        last = checkpoint.with_suffix("") / _LAST
        trainer, _, _ = _fit(cfg, last, stage=stage, start=None)
        if trainer.is_global_zero:
            last.replace(checkpoint)
            last.parent.rmdir()
        trainer.strategy.barrier(checkpoint.name)
    return _load(instantiate(cfg.model), checkpoint)


def _fit(
    cfg: DictConfig, last: Path, *, stage: str, start: L.LightningModule | None
) -> tuple[L.Trainer, L.LightningModule, Any]:
    """Fit one stage, from its last checkpoint where there is one."""
    # Every stage starts from the seed, so that it does not matter whether those before it were trained or loaded.
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    if start is not None:
        rebuild_(model, changed_widths(widths_of(model), widths_of(start)))  # a narrow baseline stays narrow
        model.load_state_dict(start.state_dict())
    model = _taught(cfg, model)
    trainer = instantiate(cfg.trainer, callbacks=list(instantiate(cfg.callbacks).values()))
    _say(f"{stage}: {trainer.max_epochs} epochs" + (f", resumed from {last}" if last.exists() else ""))
    trainer.fit(model, datamodule=data, ckpt_path=last if last.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.max_epochs == 0:  # no epoch has left a checkpoint, but the end of the fit may have changed the network
        trainer.save_checkpoint(last)
    return trainer, model, data


def _taught(cfg: DictConfig, model: L.LightningModule, *, reads: bool = True) -> L.LightningModule:
    """Return the module that is fitted: the model itself, or the distillation that it is the student of.

    A larger network that teaches is read when the fit begins, since it may not be trained yet; or left as it is built.
    """
    if cfg.get("distillation") is None:
        return model
    larger = teacher_stage(cfg)
    teacher = {}
    if larger is not None:
        built = partial(instantiate, larger.model)
        teacher = {"teacher": (lambda: _load(built(), Path(cfg.output) / _TEACHER)) if reads else built()}
    taught: L.LightningModule = instantiate(cfg.distillation)(student=model, **teacher)
    return taught


def _load(model: L.LightningModule, checkpoint: Path) -> L.LightningModule:
    """Load a Lightning checkpoint, or the plain weights of the network, as a model zoo publishes them."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    try:
        weights = state.get("state_dict", state)
        if weights.keys() & model.state_dict().keys():
            model.on_load_checkpoint(state)
            model.load_state_dict(weights)
        else:  # written by DataParallel, by a DistillationModule, or without a LightningModule around the network
            load_weights_(find_network(model), checkpoint)
    except (AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"baseline must be a checkpoint of {type(model).__name__} with this model, or the weights of its network,"
            f" got {checkpoint}: {reason}"
        ) from error
    return model.eval()


def _report(
    cfg: DictConfig,
    folder: Path,
    trainer: L.Trainer,
    *,
    dense: L.LightningModule,
    compressed: L.LightningModule,
    data: Any,
) -> None:
    """Measure the files on the test data, which nothing has read before, and write the report."""
    exported = next(callback for callback in callbacks_of(trainer) if isinstance(callback, ExportArtifacts))
    dense_network, network = (find_network(model, exported.network) for model in (dense, compressed))
    example = (data.example_input,)
    files = {"dense": export(dense_network, folder / "baseline.onnx", example_inputs=example)}
    if "pte" in exported.formats:
        files["dense, ExecuTorch"] = export(dense_network, folder / "baseline.pte", example_inputs=example)
    files |= {suffix: exported.folder / f"{exported.name}.{suffix}" for suffix in exported.formats}
    data.setup("test")
    _say(f"measuring {len(files)} files on the test data")
    measured = measure_artifacts(files, loader=data.test_dataloader(), example_inputs=example, threads=1)
    sizes = {"dense": footprint(dense_network, example), "compressed": footprint(exported.exported or network, example)}
    if captured_of(network) is not None:
        sizes["compressed"] = of_integers(sizes["compressed"], convert(network))
    rows = []
    for name, measurement in measured.items():
        verification = exported.verifications.get(name)
        is_dense = verification is None
        mac_type: MacType = "int8" if captured_of(network) is not None and not is_dense else "fp32"
        rows.append(
            report_row(
                name if is_dense else _label(name, mac_type),
                measurement,
                dense=sizes["dense"],
                network=sizes["dense" if is_dense else "compressed"],
                mac_type=mac_type,
                verified=verification,
            )
        )
    report = Report(
        title=cfg.title or "lightning_edge",
        command=shlex.join(["lightning-edge", *sys.argv[1:]]),
        environment=environment(),
        baseline=rows[0],
        artifacts=tuple(rows[1:]),
        layers=sizes["compressed"],
        history=(*_history(folder / _BASELINE, "dense"), *_history(folder / _LAST, "compression")),
        notes=(f"recipe {exported.recipe_hash}, seed {cfg.seed}", *_dead_units(exported)),
    )
    write_report(report, folder)
    print_table(report)
    _say(f"{folder / 'report.html'} has the plots")


def _dead_units(exported: ExportArtifacts) -> list[str]:
    if exported.dead_units is None or not exported.dead_units.count:
        return []
    each = ", ".join(f"{name} {count}" for name, count in exported.dead_units.removed.items())
    return [f"{exported.dead_units.count} dead units were removed before the export: {each}"]


def _label(suffix: str, mac_type: MacType) -> str:
    return f"{suffix}, {mac_type}" if mac_type != "fp32" else suffix


def _history(checkpoint: Path, stage: str) -> list[EpochRecord]:
    """Return what the stage's ``History`` kept; a baseline of the user's own may have none."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    epochs = state.get("callbacks", {}).get("History", {}).get("epochs", [])
    return [
        EpochRecord(stage, int(row["epoch"]), row.get("val/error"), row["sparsity"], int(row["distinct_values"]))
        for row in epochs
    ]


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    """Copy to a temporary name and rename: the target is whole or not there."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
