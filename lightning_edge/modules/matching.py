"""What a student's calls are compared with: the teachers' outputs and features for the same inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.modules.distillation_terms import DistillationTerm
from lightning_edge.modules.teachers import OutputAdapter, Teachers
from lightning_edge.surgery.adapters import FeatureAdapter, Projection
from lightning_edge.surgery.capture import keep_random_state
from lightning_edge.surgery.distillation import Call, match_layers, recorded

_EMBEDDING = 128


class Matching(nn.Module):
    """Terms over pairs of tensors, the student's and a teacher's, and the adapters between them.

    Of all that belongs to a teacher, the adapters alone are trained, and are in checkpoints until the student is done.

    Args:
        terms: By name.
        teachers: Not a part of this module.
        output_adapter: Returns the tensor to be matched of what a network returns.
    """

    def __init__(
        self, terms: Mapping[str, DistillationTerm], teachers: Teachers, output_adapter: OutputAdapter
    ) -> None:
        super().__init__()
        self.terms, self.teachers, self.output_adapter = dict(terms), teachers, output_adapter
        self.adapters = nn.ModuleDict()
        self._pairs: dict[str, list[list[tuple[str, str]]]] = {}  # of each term, for each teacher

    def build(self, student: nn.Module) -> None:
        """Build the teachers, and pair the layers.

        Raises:
            FileNotFoundError: If a teacher's checkpoint does not exist.
            ValueError: If a layer does not.
        """
        self.teachers.build(student)
        self._pairs = {
            name: [match_layers(student, teacher, term.layers or {}) for teacher in self.teachers.networks]
            for name, term in self.terms.items()
        }

    @property
    def is_built(self) -> bool:
        """Whether the layers are paired."""
        return bool(self._pairs)

    @property
    def layers(self) -> list[str]:
        """Names of the student's layers that are matched."""
        return list(dict.fromkeys(own for term in self._pairs.values() for pairs in term for own, _ in pairs))

    @property
    def adapted_terms(self) -> list[str]:
        """Names of the terms that need adapters where sizes differ."""
        return [
            name
            for name, term in self.terms.items()
            if term.needs_projections or (term.layers is not None and term.needs_same_shape)
        ]

    def build_adapters(self, student: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Make the adapters, with the sizes of the features of some inputs.

        Raises:
            ValueError: If features cannot be adapted.
        """
        flags = {layer: layer.training for layer in student.modules()}
        try:
            with torch.no_grad(), keep_random_state(), recorded(student.eval(), self.layers) as calls:
                student(*inputs)
        finally:
            for layer, training in flags.items():
                layer.training = training
        for index in range(len(self.teachers.networks)):
            taught = self._teach(index, calls[0], inputs[0].device)
            for name in self.adapted_terms:
                for place, pair in enumerate(self._tensors(self._pairs[name][index], calls[0], taught)):
                    self._build_adapter(f"{name}_{index}_{place}", self.terms[name], *pair)

    def forward(self, calls: Sequence[Call], labels: Tensor | None, *, device: torch.device) -> dict[str, Tensor]:
        """Return each term, the mean over the student's calls and over the teachers by their shares."""
        sums: dict[str, Tensor] = {}
        for call in calls:
            for index, share in enumerate(self.teachers.shares):
                taught = self._teach(index, call, device)
                for name, term in self.terms.items():
                    more = {"labels": labels} if term.needs_labels else {}
                    losses = [
                        term.function(*self._adapted(f"{name}_{index}_{place}", *pair), **more)
                        for place, pair in enumerate(self._tensors(self._pairs[name][index], call, taught))
                    ]
                    value = torch.stack(losses).mean() * (share / len(calls))
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _teach(self, index: int, call: Call, device: torch.device) -> Call:
        names = dict.fromkeys(other for term in self._pairs.values() for _, other in term[index])
        with recorded(self.teachers.networks[index], list(names)) as calls:
            self.teachers(index, call.args, call.kwargs, device=device)
        return calls[0]

    def _tensors(self, pairs: Sequence[tuple[str, str]], own: Call, taught: Call) -> list[tuple[Tensor, Tensor]]:
        if not pairs:
            return [(self.output_adapter(own.output), self.output_adapter(taught.output))]
        for whose, call, names in zip(("student", "teacher"), (own, taught), zip(*pairs, strict=True), strict=True):
            missing = [name for name in names if name not in call.features]
            if missing:
                raise ValueError(f"layers must be called by the {whose}'s network, got no call of {missing[:3]}")
        return [(own.features[ours], taught.features[theirs]) for ours, theirs in pairs]

    def _adapted(self, key: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        adapt: dict[str, Any] = dict(self.adapters.items())
        if f"{key}_student" in adapt:
            student = adapt[f"{key}_student"](student)
        if f"{key}_teacher" in adapt:
            teacher = adapt[f"{key}_teacher"](teacher)
        return student, teacher

    def _build_adapter(self, key: str, term: DistillationTerm, student: Tensor, teacher: Tensor) -> None:
        own, other = tuple(student.shape), tuple(teacher.shape)
        if term.needs_projections:
            self.adapters[f"{key}_student"] = Projection(own, _EMBEDDING)
            self.adapters[f"{key}_teacher"] = Projection(other, _EMBEDDING)
        elif own[1:] != other[1:]:
            self.adapters[f"{key}_student"] = FeatureAdapter(own, other)
