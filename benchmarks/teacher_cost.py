"""What a teacher adds to a training step, against its own inference forward: ResNet-20 taught by ResNet-56.

Three things take turns, in an order that changes with every round, so that whatever else the machine does meets all of
them: a step of the student with its teacher, a step without, and a forward of the teacher alone, in evaluation mode and
without gradients. Each round gives one ratio: (with - without) / forward; at most 1 is what a teacher has to cost. The
student's own losses over the logits are small beside it.

Run: python benchmarks/teacher_cost.py
"""

import argparse
import time
from collections.abc import Callable

import torch
from pruning_cost import interval
from results import markdown, write_section
from torch import Tensor

from lightning_edge import DistillationModule, DistillationTerm
from lightning_edge.models import ResNet20, ResNet56
from lightning_edge.modules import ClassificationModule

THREADS, BATCH, WARM_UP = 2, 128, 3
TERMS = {
    "soft targets": {"soft": DistillationTerm(weight=0.9)},
    "soft targets and three hints": {
        "soft": DistillationTerm(weight=0.9),
        "hint": DistillationTerm("hint", weight=0.1, layers={"layer?": "layer?"}),
    },
}


def step_of(module: ClassificationModule | DistillationModule, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a function that takes one training step; what is logged goes nowhere."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9)
    module.train()

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def contestants(terms: dict[str, DistillationTerm], batch: tuple[Tensor, Tensor]) -> list[Callable[[], object]]:
    """Return a step with the teacher, a step without, and the teacher's forward."""
    torch.manual_seed(0)
    plain, student, teacher = ClassificationModule(ResNet20()), ClassificationModule(ResNet20()), ResNet56()
    taught = DistillationModule(student, teacher, terms)
    taught.matching.build(student.network)
    for module in (plain, student, taught):
        module.log = module.log_dict = lambda *_, **__: None
    taught.trainer = Unending()

    @torch.no_grad()
    def forward() -> Tensor:
        return teacher(batch[0])

    return [step_of(taught, batch), step_of(plain, batch), forward]


class Unending:
    """As much of a trainer as a step asks for."""

    current_epoch, max_epochs, max_steps, num_training_batches, accumulate_grad_batches = 0, 1, -1, 1, 1


def seconds_of_rounds(functions: list[Callable[[], object]], rounds: int) -> Tensor:
    """Return the seconds of each function in each round, shape (rounds, functions)."""
    times = torch.zeros(WARM_UP + rounds, len(functions), dtype=torch.float64)
    for number in range(WARM_UP + rounds):
        for turn in range(len(functions)):
            place = (turn + number) % len(functions)
            start = time.perf_counter()
            functions[place]()
            times[number, place] = time.perf_counter() - start
    return times[WARM_UP:]


def median_ratio(samples: Tensor) -> Tensor:
    """Return the median of what the teacher adds over its forward: columns (with, without, forward)."""
    return torch.quantile((samples[:, 0] - samples[:, 1]) / samples[:, 2], 0.5)


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="of a step with, a step without, and a forward")
    parser.add_argument("--trial", action="store_true", help="print, and write no results")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(10, (BATCH,), generator=generator)
    rows = []
    for title, terms in TERMS.items():
        times = seconds_of_rounds(contestants(terms, batch), arguments.rounds)
        with_teacher, without, forward = (1000 * times.median(0).values).tolist()
        middle, low, high = interval(median_ratio, times)
        rows.append(
            {
                "terms": title,
                "step with, ms": f"{with_teacher:.0f}",
                "step without, ms": f"{without:.0f}",
                "teacher's forward, ms": f"{forward:.0f}",
                "added / forward, 95 % interval": f"{middle:.3f} ({low:.3f} to {high:.3f})",
            }
        )
    body = (
        f"ResNet-20 taught by ResNet-56, batch {BATCH}, float32, {THREADS} threads, {arguments.rounds} rounds; medians,"
        f" and the median of the ratios of each round with its bootstrap interval.\n\n{markdown(rows)}"
    )
    if arguments.trial:
        print(body)
    else:
        write_section(
            "Cost of a teacher", command=f"python benchmarks/teacher_cost.py --rounds {arguments.rounds}", body=body
        )


if __name__ == "__main__":
    main()
