"""What a student's calls are compared with: the teachers' outputs and features for the same inputs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.modules.distillation_terms import DistillationTerm
from lightning_edge.modules.teachers import Teachers
from lightning_edge.surgery.adapters import FeatureAdapter, Projection
from lightning_edge.surgery.capture import keep_random_state, training_flags
from lightning_edge.surgery.distillation import Call, match_layers, recorded
from lightning_edge.surgery.selection import unwrapped

OutputAdapter = Callable[..., Tensor]

_EMBEDDING = 128


class Matching(nn.Module):
    """Terms over pairs of tensors, the student's and a teacher's, and the adapters between them.

    Of all that belongs to a teacher, the adapters alone are trained, and are in checkpoints until the student is done.

    Args:
        terms: By name.
        teachers: Not a part of this module.
        output_adapter: Returns the tensor to be matched of what a network returns, and of the batch where it takes one.

    Raises:
        ValueError: If a term that projects the outputs would need a batch before there is one.
    """

    def __init__(
        self, terms: Mapping[str, DistillationTerm], teachers: Teachers, output_adapter: OutputAdapter
    ) -> None:
        super().__init__()
        self.terms, self.teachers, self.output_adapter = dict(terms), teachers, output_adapter
        self.adapters = nn.ModuleDict()
        self._pairs: dict[str, list[list[tuple[str, str]]]] = {}  # of each term, for each teacher
        self._sees_batch = "batch" in _parameters(output_adapter)
        projected = [name for name, term in terms.items() if term.needs_projections and term.layers is None]
        if self._sees_batch and projected:
            raise ValueError(
                f"output_adapter must not take the batch for losses[{projected[0]!r}], whose projections are made"
                " before the first batch: match a layer, or leave the parameter away"
            )

    def build(self, student: nn.Module) -> None:
        """Build the teachers, and pair the layers.

        Raises:
            FileNotFoundError: If a teacher's checkpoint does not exist.
            ValueError: If a layer does not, or a teacher is the student.
        """
        self.teachers.build(student)
        self._pairs = {
            name: [match_layers(student, teacher, term.layers or {}) for teacher in self.teachers.networks]
            for name, term in self.terms.items()
        }

    def check(self, student: nn.Module) -> None:
        """Raise a ValueError if a layer that a term matches does not exist, as far as the teachers are known."""
        for term in self.terms.values():
            for teacher in self.teachers.stand_ins(student):
                if teacher is None:
                    match_layers(student, student, {own: own for own in term.layers or {}})
                else:
                    match_layers(student, teacher, term.layers or {})

    @property
    def is_built(self) -> bool:
        """Whether the layers are paired."""
        return bool(self._pairs)

    @property
    def layers(self) -> list[str]:
        """Names of the student's layers that are matched."""
        return list(dict.fromkeys(own for name in self._pairs for own in self.layers_of(name)))

    @property
    def rehearsed_terms(self) -> list[str]:
        """Names of the terms that are tried before the fit: of layers, or with adapters."""
        return [name for name, term in self.terms.items() if term.layers is not None or term.needs_projections]

    @property
    def needs_adapters(self) -> bool:
        """Whether a term needs sizes of features before the fit."""
        return bool(self.terms_with_adapters) or any(term.needs_projections for term in self.terms.values())

    @property
    def terms_with_adapters(self) -> list[str]:
        """Names of the terms of layers whose widths may not change: an adapter, or the loss, is made for them."""
        return [
            name
            for name, term in self.terms.items()
            if term.layers is not None and (term.needs_projections or term.needs_same_shape)
        ]

    def layers_of(self, term: str) -> list[str]:
        """Return the names of the student's layers that a term matches."""
        return [own for pairs in self._pairs[term] for own, _ in pairs]

    def rehearse(self, student: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Make the adapters, with the sizes of the features of some inputs, and try the terms that can be tried.

        Args:
            student: Left as it was.
            inputs: What it is called with.

        Raises:
            ValueError: If features cannot be adapted or compared, with the term and its layers.
        """
        with torch.no_grad(), keep_random_state(), training_flags(student, False):
            with recorded(student, self.layers) as calls:
                student(*inputs)
            for index in range(len(self.teachers.networks)):
                taught = self._teach(index, calls[0], inputs[0].device)
                for name in self.rehearsed_terms:
                    for place, pair in enumerate(self._tensors(name, index, calls[0], taught, None)):
                        self._build_adapter(name, index, place, pair, unwrapped(student))
                        if not self.terms[name].needs_labels:
                            self._compare(name, index, place, pair, {})

    def teach(self, call: Call, *, device: torch.device) -> None:
        """Add to a call of the student what each teacher gives for its inputs.

        Before the student runs: while its activations are alive the allocator has no memory to reuse, and a teacher
        takes a third longer.
        """
        call.taught = [self._teach(index, call, device) for index in range(len(self.teachers.networks))]

    def forward(self, calls: Sequence[Call], batch: Any, labels: Tensor | None) -> dict[str, Tensor]:
        """Return each term, the mean over the student's calls and over the teachers by their shares."""
        sums: dict[str, Tensor] = {}
        for call in calls:
            for index, (share, taught) in enumerate(zip(self.teachers.shares, call.taught, strict=True)):
                for name, term in self.terms.items():
                    more = {"labels": labels} if term.needs_labels else {}
                    pairs = self._tensors(name, index, call, taught, batch)
                    losses = [self._compare(name, index, place, pair, more) for place, pair in enumerate(pairs)]
                    value = torch.stack(losses).mean() * (share / len(calls))
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _teach(self, index: int, call: Call, device: torch.device) -> Call:
        names = dict.fromkeys(other for term in self._pairs.values() for _, other in term[index])
        return self.teachers(index, call, list(names), device=device)

    def _tensors(self, term: str, index: int, own: Call, taught: Call, batch: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = self._pairs[term][index]
        if not pairs:
            adapt = partial(self.output_adapter, batch=batch) if self._sees_batch else self.output_adapter
            return [(adapt(own.output), adapt(taught.output))]
        for whose, call, names in zip(("student", "teacher"), (own, taught), zip(*pairs, strict=True), strict=True):
            missing = [name for name in names if name not in call.features]
            if missing:
                raise ValueError(
                    f"layers of losses[{term!r}] must be called by the {whose}'s network, got no call of"
                    f" {missing[:3]}: a network under torch.compile calls none, match its outputs or compile it later"
                )
        return [(own.features[ours], taught.features[theirs]) for ours, theirs in pairs]

    def _compare(
        self, term: str, index: int, place: int, pair: tuple[Tensor, Tensor], more: Mapping[str, Tensor | None]
    ) -> Tensor:
        try:
            return self.terms[term].function(*self._adapted(_key(term, index, place), *pair), **more)
        except (ValueError, RuntimeError) as error:  # RuntimeError: torch's own, of sizes that do not fit
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"{self._where(term, index, place)}: {error}") from error

    def _where(self, term: str, index: int, place: int) -> str:
        if not self._pairs[term][index]:
            return f"losses[{term!r}] must fit what output_adapter and labels make of the outputs"
        own, other = self._pairs[term][index][place]
        return f"losses[{term!r}] must fit layer {own!r} of the student and {other!r} of the teacher"

    def _adapted(self, key: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        adapt: dict[str, Any] = dict(self.adapters.items())
        if f"{key}_student" in adapt:
            # Where images differ in size from batch to batch, so do the positions.
            more = (teacher.shape[2:],) if isinstance(adapt[f"{key}_student"], FeatureAdapter) else ()
            student = adapt[f"{key}_student"](student, *more)
        if f"{key}_teacher" in adapt:
            teacher = adapt[f"{key}_teacher"](teacher)
        return student, teacher

    def _build_adapter(
        self, name: str, index: int, place: int, pair: tuple[Tensor, Tensor], student: nn.Module
    ) -> None:
        term, key = self.terms[name], _key(name, index, place)
        own, other = (tuple(tensor.shape) for tensor in pair)
        pairs = self._pairs[name][index]
        layers = () if not pairs else (student.get_submodule(pairs[place][0]),)
        channels_first = any(_has_positions_last(layer) for layer in layers)
        if term.needs_projections:
            for whose, shape in (("student", own), ("teacher", other)):
                projection = Projection(shape, _EMBEDDING, channels_first=channels_first)
                self.adapters[f"{key}_{whose}"] = projection.to(pair[0])
        elif term.layers is not None and term.needs_same_shape and own[1:] != other[1:]:
            try:
                adapter = FeatureAdapter(own, other, channels_first=channels_first)
            except ValueError as error:
                raise ValueError(f"{self._where(name, index, place)}: {error}") from error
            self.adapters[f"{key}_student"] = adapter.to(pair[0])


def _key(term: str, index: int, place: int) -> str:
    return f"{term}_{index}_{place}"


def _has_positions_last(layer: nn.Module) -> bool:
    """Return whether features of three dimensions are (batch, channels, positions): a layer of such is inside."""
    kinds = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)
    return any(isinstance(inner, kinds) for inner in layer.modules())


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some functions written in C tell no signature
        return {}
