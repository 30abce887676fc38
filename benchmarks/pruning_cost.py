"""What masks add to a training step: WeightPruning, and torch.nn.utils.prune, on which Lightning builds ModelPruning.

Two copies of one network with equal weights, with and without masks, take turns, step by step, so that whatever else
the machine does meets both; each pair of steps gives one ratio. The copy that goes first changes with every pair.

Run: python benchmarks/pruning_cost.py
"""

import argparse
import copy
import logging
import time
import warnings
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
PLAIN, OURS, PRUNE = "none", "WeightPruning", "torch.nn.utils.prune"


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
        self.optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

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


def copies(workload: Workload) -> dict[str, Module]:
    """Return copies with equal weights: plain, and with both mechanisms on every weight."""
    torch.manual_seed(0)
    projected, masks = pruned(workload.make(), workload.batch())
    plain, reparametrized = copy.deepcopy(projected.network), copy.deepcopy(projected.network)
    for name, mask in masks.items():
        prune.custom_from_mask(reparametrized.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return {PLAIN: Module(plain), OURS: projected, PRUNE: Module(reparametrized)}


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
    """Return what ours adds as a share of what torch adds: columns (plain, ours, plain, torch)."""
    return (median_ratio(samples[:, :2]) - 1) / (median_ratio(samples[:, 2:]) - 1)


def seconds_of_pairs(plain: Module, masked: Module, batch: Sequence[Tensor], pairs: int) -> Tensor:
    """Return the seconds of the steps, shape (pairs, 2), plain first."""
    times = torch.zeros(WARM_UP + pairs, 2, dtype=torch.float64)
    for pair in range(WARM_UP + pairs):
        for turn in range(2):
            place = (turn + pair) % 2
            times[pair, place] = (plain, masked)[place].seconds_of_step(batch)
        if pair >= WARM_UP and (pair - WARM_UP + 1) % 20 == 0:
            print(f"{pair - WARM_UP + 1} pairs, ratio {median_ratio(times[WARM_UP : pair + 1]):.4f}", flush=True)
    return times[WARM_UP:]


def measure(workload: Workload, pairs: int) -> tuple[list[dict[str, str]], str]:
    """Return the lines of the table, and what they say about the bars."""
    modules, rows, times = copies(workload), [], {}
    for name in (OURS, PRUNE):
        print(workload.title, name, flush=True)
        times[name] = seconds_of_pairs(modules[PLAIN], modules[name], workload.batch(), pairs)
        plain, masked = (1000 * times[name].median(0).values).tolist()
        middle, low, high = interval(median_ratio, times[name])
        rows.append(
            {
                "network": workload.title,
                "masks": name,
                "ms without": f"{plain:.1f}",
                "ms with": f"{masked:.1f}",
                "ratio, 95 % interval": f"{middle:.4f} ({low:.4f} to {high:.4f})",
            }
        )
    middle, low, high = interval(share_of_added, torch.cat([times[OURS], times[PRUNE]], dim=1))
    bars = (
        f"{workload.title}: the bar of {OURS} is {workload.bar}; it adds {middle:.3f} ({low:.3f} to {high:.3f}) of what"
        f" {PRUNE} adds."
    )
    return rows, bars


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="steps of every variant")
    parser.add_argument("--only", choices=WORKLOADS, help="measure this one, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = [workload for key, workload in WORKLOADS.items() if arguments.only in (None, key)]
    parts = [measure(workload, arguments.pairs) for workload in chosen]
    rows, bars = [row for rows, _ in parts for row in rows], [bar for _, bar in parts]
    body = (
        f"{THREADS} threads, SGD with momentum, masks on every weight, sparsity {SPARSITY},"
        f" {arguments.pairs} pairs of steps; median of the paired ratios, bootstrap interval.\n\n"
        f"{markdown(rows)}\n\n" + "\n".join(bars)
    )
    if arguments.only:
        print(body)
        return
    write_section("Cost of masks", command=f"python benchmarks/pruning_cost.py --pairs {arguments.pairs}", body=body)


if __name__ == "__main__":
    main()
