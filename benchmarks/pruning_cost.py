"""What masks add to a training step: WeightPruning, and torch.nn.utils.prune, on which Lightning builds ModelPruning.

Copies of one network with equal weights take turns, step by step, so that whatever else the machine does meets all of
them; each pair of steps gives one ratio.

Run: python benchmarks/pruning_cost.py
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from results import markdown, write_section
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import WeightPruning
from lightning_edge.models import ResNet20

THREADS, SPARSITY, WARM_UP, RESAMPLES = 2, 0.8, 5, 10_000


@dataclass(frozen=True)
class Workload:
    """A network, its batch, and how much longer a step with masks may be."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bar: float

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return random inputs and labels."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, self.shape[:1], generator=generator)
        return torch.randn(self.shape, generator=generator), labels


def mlp() -> nn.Module:
    """Return a perceptron of 25.2 million weights."""
    return nn.Sequential(
        nn.Linear(2048, 4096),
        nn.ReLU(),
        nn.Linear(4096, 3072),
        nn.ReLU(),
        nn.Linear(3072, 1360),
        nn.ReLU(),
        nn.Linear(1360, 10),
    )


WORKLOADS = {
    "resnet20": Workload("ResNet-20, batch 128", ResNet20, (128, 3, 32, 32), 1.03),
    "mlp": Workload("MLP of 25M weights, batch 8", mlp, (8, 2048), 1.08),
}


class Module(L.LightningModule):
    """A network and the optimizer that steps it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)

    def training_step(self, batch: Sequence[Tensor], _: int = 0) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.optimizer

    def seconds_of_step(self, batch: Sequence[Tensor]) -> float:
        """Take one step, and return how long it took."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.training_step(batch).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def pruned(network: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Module, dict[str, Tensor]]:
    """Return a network in the state in which WeightPruning leaves it, its hook on the optimizer, and the masks."""
    module, callback = Module(network), WeightPruning(SPARSITY)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, DataLoader(TensorDataset(*batch), len(batch[0])))
    return module.train(), callback.state_dict()["masks"]


def variants(workload: Workload) -> dict[str, Module]:
    """Return the copies to compare, of equal weights: plain, and with both mechanisms on every weight."""
    torch.manual_seed(0)
    projected, masks = pruned(workload.make(), workload.batch())
    plain = Module(copy.deepcopy(projected.network))
    reparametrized = copy.deepcopy(projected.network)
    for name, mask in masks.items():
        layer = reparametrized.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(layer, "weight", mask)
    return {"none": plain, "WeightPruning": projected, "torch.nn.utils.prune": Module(reparametrized)}


def interval(statistic: Callable[[Tensor], Tensor], samples: Tensor) -> tuple[float, float, float]:
    """Return a statistic over the columns of samples, shape (samples, values), and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(samples), (RESAMPLES, len(samples)), generator=generator)
    found = torch.stack([statistic(samples[rows]) for rows in drawn])
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return float(statistic(samples)), low, high


def median_ratio(samples: Tensor) -> Tensor:
    """Return the median of the ratios of pairs, columns (plain, masked)."""
    return torch.quantile(samples[:, 1] / samples[:, 0], 0.5)


def share_of_added(samples: Tensor) -> Tensor:
    """Return what the second mechanism adds as a share of what the third adds, by median ratios."""
    return (median_ratio(samples[:, :2]) - 1) / (median_ratio(samples[:, ::2]) - 1)


def measure(workload: Workload, pairs: int) -> Tensor:
    """Return the seconds of the steps, shape (pairs, variants)."""
    modules, batch = list(variants(workload).values()), workload.batch()
    times = torch.zeros(WARM_UP + pairs, len(modules), dtype=torch.float64)
    for pair in range(WARM_UP + pairs):
        for turn in range(len(modules)):
            place = (turn + pair) % len(modules)  # each goes first as often as the others
            times[pair, place] = modules[place].seconds_of_step(batch)
        if pair >= WARM_UP and (pair - WARM_UP + 1) % 20 == 0:
            ratios = (times[WARM_UP : pair + 1] / times[WARM_UP : pair + 1, :1]).median(0).values.tolist()
            print(workload.title, pair - WARM_UP + 1, [round(ratio, 4) for ratio in ratios], flush=True)
    return times[WARM_UP:]


def row(workload: Workload, name: str, times: Tensor) -> dict[str, str]:
    """Return one line of the table: columns of times are plain and this variant."""
    middle, low, high = interval(median_ratio, times)
    return {
        "workload": workload.title,
        "masks": name,
        "ms a step, median": f"{1000 * statistics.median(times[:, 1].tolist()):.1f}",
        "against none, 95 % interval": f"{middle:.4f} ({low:.4f} to {high:.4f})",
    }


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="steps of every variant")
    parser.add_argument("--only", choices=WORKLOADS, help="measure this one, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows, shares = [], []
    for key, workload in WORKLOADS.items():
        if arguments.only in (None, key):
            times = measure(workload, arguments.pairs)
            names = ("none", "WeightPruning", "torch.nn.utils.prune")
            rows += [row(workload, name, times[:, [0, place]]) for place, name in enumerate(names) if place]
            middle, low, high = interval(share_of_added, times)
            shares.append(
                f"{workload.title}: WeightPruning is to stay within {workload.bar}; it adds {middle:.3f}"
                f" ({low:.3f} to {high:.3f}) of what torch.nn.utils.prune adds."
            )
    body = (
        f"{THREADS} threads, SGD with momentum and weight decay, masks on every weight, sparsity {SPARSITY},"
        f" {arguments.pairs} steps of each in turns; median of the paired ratios, bootstrap interval.\n\n"
        f"{markdown(rows)}\n\n" + "\n".join(shares)
    )
    if arguments.only:
        print(body)
        return
    write_section("Cost of masks", command=f"python benchmarks/pruning_cost.py --pairs {arguments.pairs}", body=body)


if __name__ == "__main__":
    main()
