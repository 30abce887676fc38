"""A LightningModule that trains a student, any LightningModule, with what a frozen teacher knows."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edge.functional.schedules import epochs_of_fit
from lightning_edge.modules.classification import ClassificationModule
from lightning_edge.modules.distillation_terms import TASK, DistillationTerm, checked_terms
from lightning_edge.modules.matching import Matching, OutputAdapter
from lightning_edge.modules.rehearsal import rehearse
from lightning_edge.modules.teachers import MovingAverage, Precision, Teachers, TeacherSource
from lightning_edge.modules.wrapping import lend_hooks_, speaking_for
from lightning_edge.surgery.distillation import first_tensor, recorded
from lightning_edge.surgery.selection import find_network, network_path

_AVERAGES = "lightning_edge.moving_average_teachers"


class DistillationModule(L.LightningModule):
    """Train a student with its own loss and with what a teacher gives for the same inputs.

    The loss is ``task_weight`` times what the student's own ``training_step`` returns, plus the terms. Validation,
    test, metrics, optimizer, data and every other hook are the student's own. The teacher is called with exactly what
    the student's network is called with; it is frozen, in evaluation mode, runs without gradients, and is in no
    optimizer, checkpoint or DDP bucket.

    Every term is logged as ``distillation/NAME``, before its weight, the student's own loss as ``distillation/task``.

    Args:
        student: A LightningModule with automatic optimization; or a plain classifier, which is wrapped in a
            :class:`ClassificationModule` (then ``num_classes`` says how many classes it has).
        teacher: A network, a LightningModule, a callable, the path of a checkpoint of the student's own architecture, a
            :class:`MovingAverage`, or a list of these, see :class:`Teachers`. Without one nothing can be trained, but a
            checkpoint can be loaded, validated, tested and exported.
        losses: Terms by name. Default: soft targets at temperature 4 with weight 0.9.
        task_weight: Of the student's own loss, >= 0.
        teacher_weights: Share of each teacher of a list; default: equal ones.
        teacher_precision: In which the teacher computes, ``"32"`` or ``"bf16"``; default: as the student does.
        cache: Folder where the teacher's outputs are kept, for training data without random augmentation: it computes
            each row once, in this run and the next. Other weights, layers or data are told apart. See
            :class:`TeacherCache`.
        output_adapter: Returns the tensor to be matched of what a network returns, of student and teacher alike; one
            with a parameter ``batch`` gets the batch too, so as to leave padded tokens out. Default: the output, or the
            first of a tuple.
        labels: Returns the labels of a batch, for a loss that needs them; default: what the batch has second.
        num_classes: Of a plain student.

    Raises:
        ValueError: If an argument is out of its range, or the student optimizes manually; when the fit begins, if
            there is no teacher, a layer does not exist, or a term cannot compare what its layers give.

    >>> module = DistillationModule(nn.Linear(4, 3), teacher=nn.Linear(4, 3), num_classes=3)
    >>> sorted(module.student_state_dict())
    ['bias', 'weight']
    """

    student_child: ClassVar[str] = "student"
    """Where callbacks and exporters find the network that is compressed."""

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherSource | Sequence[TeacherSource] | None = None,
        losses: Mapping[str, DistillationTerm] | None = None,
        *,
        task_weight: float = 0.1,
        teacher_weights: Sequence[float] | None = None,
        teacher_precision: Precision | None = None,
        cache: str | Path | None = None,
        output_adapter: OutputAdapter | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not task_weight >= 0:
            raise ValueError(f"task_weight must be >= 0, got {task_weight}")
        own = student if isinstance(student, L.LightningModule) else None
        self.student = own or ClassificationModule(student, num_classes=num_classes)
        if not self.student.automatic_optimization:
            raise ValueError(
                f"student must use automatic optimization, got {type(student).__name__}, which steps its optimizers by"
                " itself: a distillation loss could not be added to what it has already stepped"
            )
        default = {"soft_targets": DistillationTerm(weight=0.9, temperature=4.0)}
        terms = checked_terms(default if losses is None else losses)
        self.task_weight, self.labels = task_weight, labels or _second
        self.matching: Matching | None = None
        if teacher is not None:
            teachers = Teachers(_listed(teacher), teacher_weights, precision=teacher_precision, cache=cache)
            self.matching = Matching(terms, teachers, output_adapter or first_tensor)
        self.example_input_array = self.student.example_input_array
        if own is not None and own.hparams:
            self.save_hyperparameters(dict(own.hparams), logger=own._log_hyperparams)  # for checkpoints and loggers
            self._hparams = own.hparams  # one object: the learning rate that a Tuner finds is the student's
        lend_hooks_(self, self.student)

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint has to have every key: as the student says."""
        return self.student.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self.student.strict_loading = strict_loading

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's output."""
        return self.student(*args, **kwargs)

    def student_state_dict(self) -> dict[str, Any]:
        """Return the plain state of the student's network: it loads with ``strict=True`` into its plain class."""
        return find_network(self).state_dict()

    def configure_model(self) -> None:
        """Build the student and, before a fit, the teacher and the adapters."""
        with speaking_for(self, self.student):
            self.student.configure_model()
        if self._trainer is None or not self.trainer.training:
            return
        matching = self._taught()
        if matching.is_built:  # Lightning and callbacks call this more than once
            return
        network = find_network(self)
        matching.build(network)
        if matching.rehearsed_terms:
            rehearse(self, matching, network)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the student's optimizer, which also steps the adapters, in its first group."""
        with speaking_for(self, self.student):
            configured = self.student.configure_optimizers()
        adapters = {} if self.matching is None else dict(self.matching.named_parameters())
        if adapters:
            group = _first_optimizer(configured).param_groups[0]
            group["params"].extend(adapters.values())
            if "param_names" in group:  # of an optimizer that was given named_parameters()
                group["param_names"].extend(f"matching.{name}" for name in adapters)
        return configured

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the student's own loss and the terms, weighted."""
        matching = self._taught()
        network = self.student.get_submodule(network_path(self.student))  # as it is called: compiled or not
        teach = partial(matching.teach, device=self.device)
        with recorded(network, matching.layers, first=teach) as calls, speaking_for(self, self.student):
            indexed = is_param_in_hook_signature(self.student.training_step, "batch_idx", min_args=2)
            result = self.student.training_step(*([batch, batch_idx] if indexed else [batch]))
        if result is None:  # Lightning's way to skip a batch
            return None
        calls = [call for call in calls if call.learns]  # another call may only measure
        if not calls:
            raise ValueError(
                f"training_step of {type(self.student).__name__} must call its network, a {type(network).__name__}, got"
                " no call with gradients: call the module, not its forward or its parts; where the network is the"
                " LightningModule itself, self(x)"
            )
        labels = self.labels(batch) if any(term.needs_labels for term in matching.terms.values()) else None
        values = matching(calls, batch, labels)
        values[TASK] = task = result["loss"] if isinstance(result, Mapping) else result
        loss = self.task_weight * task
        last_epoch = _epochs(self.trainer) - 1
        for name, term in matching.terms.items():
            loss = loss + term.weight_at(self.current_epoch, last_epoch=last_epoch) * values[name]
        logged = {f"distillation/{name}": value.detach() for name, value in values.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=calls[0].rows)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def check(self, *, epochs: float) -> None:
        """Raise a ValueError if a weight does not reach its end within so many epochs, or a layer does not exist."""
        self._taught().check(find_network(self))
        for term in self._taught().terms.values():
            term.check(epochs=epochs)

    def on_train_start(self) -> None:
        """Refuse schedules that do not end: how many epochs there are is known now. Begin the moving averages."""
        self._taught().teachers.begin(find_network(self))
        if not getattr(self.trainer, "fast_dev_run", False):
            self.check(epochs=_epochs(self.trainer))
        with speaking_for(self, self.student):
            self.student.on_train_start()

    def on_train_epoch_end(self) -> None:
        """Keep on disk what the teacher gave in this epoch, if it is to be kept."""
        with speaking_for(self, self.student):
            self.student.on_train_epoch_end()
        self._taught().teachers.close_epoch(self.trainer.strategy.barrier)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as the student does; then a moving average of it follows."""
        with speaking_for(self, self.student):
            self.student.optimizer_step(*args, **kwargs)
        self._taught().teachers.follow(find_network(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a moving average has become; no other teacher is in a checkpoint."""
        self.student.on_save_checkpoint(checkpoint)
        averages = {} if self.matching is None else self.matching.teachers.averages()
        if averages:
            checkpoint[_AVERAGES] = averages

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load without a teacher, and without adapters where nothing is trained."""
        self.student.on_load_checkpoint(checkpoint)
        own = self.state_dict()
        for name in [n for n in checkpoint["state_dict"] if n.startswith("matching.") and n not in own]:
            del checkpoint["state_dict"][name]
        if self.matching is not None and _AVERAGES in checkpoint:
            self.matching.teachers.load_averages(checkpoint[_AVERAGES], find_network(self))

    def _taught(self) -> Matching:
        if self.matching is None:
            raise ValueError("teacher must be given to train a student, got None")
        return self.matching


def _listed(teacher: TeacherSource | Sequence[TeacherSource]) -> list[TeacherSource]:
    if isinstance(teacher, Sequence) and not isinstance(teacher, str):
        return list(teacher)
    if isinstance(teacher, str | Path | nn.Module | MovingAverage) or callable(teacher):
        return [teacher]
    raise ValueError(
        "teacher must be a network, a callable that builds one, a path, MovingAverage(), or a list of these, got"
        f" {teacher!r}"
    )


def _epochs(trainer: L.Trainer) -> float:
    batches, each = trainer.num_training_batches, trainer.accumulate_grad_batches
    return epochs_of_fit(trainer.max_epochs, trainer.max_steps, batches=batches, each=each)


def _first_optimizer(configured: Any) -> Optimizer:
    while not isinstance(configured, Optimizer):
        if not configured:
            raise ValueError("student must have an optimizer, which steps the adapters too, got none")
        configured = configured["optimizer"] if isinstance(configured, Mapping) else configured[0]
    return configured


def _second(batch: Any) -> Tensor:
    if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        "labels must be a callable that returns the labels of a batch, since this one is a"
        f" {type(batch).__name__} without a tensor in second place"
    )
