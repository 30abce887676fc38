"""What Lightning's own ModelPruning and WeightPruning do in the situations that users report: one short run each.

Both are asked to prune half of the weights, once, at their first opportunity, without rewinding, so that a failure is
that of the situation; the first rows leave ModelPruning its defaults.

Run: python benchmarks/lightning_model_pruning.py
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities.compile import from_compiled
from results import markdown, write_section
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import WeightPruning

HALF, CLIP, EPOCHS = 0.5, 1e-3, 4
LAYERS = (0, 3, 6)
Make = Callable[..., L.Callback]


@dataclass(frozen=True)
class Outcome:
    """What came of one run, and whether that is what the user asked for."""

    right: bool
    text: str


class Task(L.LightningModule):
    """A small network on real digits that notes the sparsity of its weights at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
        self.layers = tuple(self.model[index] for index in LAYERS)  # found again whatever is wrapped around them
        self.seen: list[tuple[int, float]] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        value = F.cross_entropy(self.model(batch[0]), batch[1])
        self.seen.append((self.current_epoch, sparsity(self.weights())))
        return value

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Note the sparsity."""
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        """Momentum and weight decay: both could revive a weight."""
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

    def weights(self) -> list[Tensor]:
        """Return the weights of the layers, as the last forward used them."""
        return [layer.weight for layer in self.layers]

    def from_epoch(self, epoch: int) -> set[float]:
        """Return the different sparsities of all forwards from an epoch on."""
        return {value for when, value in self.seen if when >= epoch}


def sparsity(weights: Iterable[Tensor]) -> float:
    """Return the fraction of zeros."""
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    return round(float((flat == 0).double().mean()), 4)


def lightning(
    pruning_fn: str = "l1_unstructured", *, names: tuple[str, ...] = ("weight",), **options: Any
) -> L.Callback:
    """Return ModelPruning that prunes half of the weights once, without rewinding."""
    settings = {"apply_pruning": lambda epoch: epoch == 0, "use_lottery_ticket_hypothesis": False} | options
    return ModelPruning(pruning_fn, amount=HALF, parameter_names=list(names), **settings)


def ours(pruning_fn: str = "l1_unstructured", **_: Any) -> L.Callback:
    """Return WeightPruning that prunes half of the weights once."""
    return WeightPruning(HALF, score="random" if pruning_fn == "random_unstructured" else "magnitude")


def fit(task: L.LightningModule, *callbacks: L.Callback, folder: Path | None = None, **options: Any) -> L.Trainer:
    """Fit four epochs of eight batches."""
    path = options.pop("ckpt_path", None)
    L.seed_everything(options.pop("seed", 1), verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    loader = DataLoader(torch.utils.data.Subset(data, range(256)), 32, shuffle=True)
    saving = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | options
    trainer = L.Trainer(**settings, **quiet, enable_checkpointing=bool(folder), callbacks=[*callbacks, *saving])
    trainer.fit(task, loader, DataLoader(torch.utils.data.Subset(data, range(256, 320)), 64), ckpt_path=path)
    return trainer


def half(values: Iterable[float]) -> Outcome:
    """Judge sparsities that should all be one half."""
    found = sorted(set(values))
    return Outcome(all(abs(value - HALF) < 0.005 for value in found), f"sparsity {', '.join(map(str, found))}")


def compounding(make: Make, _: Path) -> Outcome:
    """Ask for one half in every epoch, with the defaults."""
    task = Task()
    fit(task, ModelPruning("l1_unstructured", amount=HALF) if make is lightning else make())
    return half([sparsity(task.weights())])


def biases_and_norms(make: Make, _: Path) -> Outcome:
    """Count the zeros outside of the weights, with the defaults."""
    task = Task()
    fit(task, ModelPruning("l1_unstructured", amount=HALF) if make is lightning else make())
    found = {
        "biases": [task.model[index].bias for index in LAYERS],
        "norm weight": [task.model[1].weight],
        "norm bias": [task.model[1].bias],
    }
    shares = {name: sparsity(tensors) for name, tensors in found.items()}
    return Outcome(not any(shares.values()), ", ".join(f"{name} {share:.0%} zero" for name, share in shares.items()))


def resuming(make: Make, folder: Path, **options: Any) -> Outcome:
    """Stop after two epochs; go on with a fresh module, callback and trainer."""
    fit(Task(), make(**options), folder=folder, max_epochs=2)
    task = Task()
    fit(task, make(**options), ckpt_path=folder / "epoch=1.ckpt")
    return half([*task.from_epoch(2), sparsity(task.weights())])


def resuming_not_permanent(make: Make, folder: Path) -> Outcome:
    """Do the same with ModelPruning's other way to save."""
    return resuming(make, folder, make_pruning_permanent=False)


def causal_mask(make: Make, folder: Path) -> Outcome:
    """Save a network with a buffer whose name ends in _mask, and load it into the plain one."""
    task, plain = Task(), Task()
    for module in (task, plain):
        module.model.register_buffer("causal_mask", torch.ones(4, 4).tril())
    fit(task, make(), folder=folder)
    plain.load_state_dict(torch.load(folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"])
    return half([sparsity(plain.weights())])


def averaging(task_class: type[Task], *, first: bool, names: tuple[str, ...]) -> Callable[[Make, Path], Outcome]:
    """Average the weights while they are pruned, in an order of the callbacks."""

    def check(make: Make, folder: Path) -> Outcome:
        task, plain, average, pruning = task_class(), task_class(), EMAWeightAveraging(decay=0.9), make(names=names)
        fit(task, *([average, pruning] if first else [pruning, average]), folder=folder)
        plain.load_state_dict(torch.load(folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"])
        found = {
            "at every forward": task.from_epoch(1),
            "in the checkpoint": {sparsity(plain.weights())},
            "at the end": {sparsity(task.weights())},
        }
        outcomes = {where: half(values) for where, values in found.items()}
        return Outcome(
            all(outcome.right for outcome in outcomes.values()),
            "; ".join(f"{outcome.text} {where}" for where, outcome in outcomes.items()),
        )

    return check


class NoNorm(Task):
    """A network without buffers: DDP then synchronizes none, and averages have none in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.model[1] = nn.Identity()


class Turns(Task):
    """Manual optimization with two optimizers that take turns."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Take one step of one of them."""
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        """Return one with and one without momentum."""
        first, second = self.model[:3].parameters(), self.model[3:].parameters()
        return torch.optim.AdamW(first, 1e-2), torch.optim.SGD(second, 0.05, momentum=0.9, weight_decay=0.01)


def trained(task_class: type[Task], **options: Any) -> Callable[[Make, Path], Outcome]:
    """Train in some way, and look at every forward after the first epoch and at the end."""

    def check(make: Make, _: Path) -> Outcome:
        task = task_class()
        fit(task, make(), **options)
        return half([*task.from_epoch(1), sparsity(task.weights())])

    return check


def clipping(make: Make, _: Path) -> Outcome:
    """Clip to a small norm; that of the kept weights must be all of it."""
    norms: list[float] = []

    class Clipped(Task):
        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            self.clip_gradients(optimizer, **options)
            kept = {f"model.{index}.weight": self.model[index].weight != 0 for index in LAYERS}
            named = {name.removesuffix("_orig"): value.grad for name, value in self.named_parameters()}
            parts = [grad[kept[name]] if name in kept else grad.flatten() for name, grad in named.items()]
            if self.current_epoch:
                norms.append(float(torch.cat(parts).norm()) / CLIP)

    fit(Clipped(), make(), gradient_clip_val=CLIP)
    return Outcome(min(norms) > 0.99, f"norm of the kept gradients / clip value {min(norms):.3f} to {max(norms):.3f}")


def compiled_network(make: Make, folder: Path) -> Outcome:
    """Compile the network inside the LightningModule, in place."""
    task = Task()
    task.model.compile(backend="eager")
    fit(task, make(), folder=folder)
    return half([*task.from_epoch(1), sparsity(task.weights())])


def wrapped_network(make: Make, folder: Path) -> Outcome:
    """Wrap the network by torch.compile; as most users do."""
    task = Task()
    task.model = torch.compile(task.model, backend="eager")
    fit(task, make(), folder=folder)
    return half([*task.from_epoch(1), sparsity(task.weights())])


def compiled_module(make: Make, folder: Path) -> Outcome:
    """Compile the LightningModule, as trainer.fit does with the result of torch.compile."""
    task = Task()
    fit(from_compiled(torch.compile(task, backend="eager")), make(), folder=folder)
    return half([*task.from_epoch(1), sparsity(task.weights())])


class Tied(Task):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
        self.model[3].weight = self.model[1].weight
        self.layers = (self.model[1], self.model[4])


class Tokens(nn.Module):
    """The mean of embedded grey levels, and a head whose weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(17, 16), nn.Linear(16, 16), nn.Linear(16, 17, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.hidden(self.embedding((16 * images.flatten(1)).long()).mean(1)))


class TiedHead(Task):
    """A network of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tokens()
        self.layers = (self.model.hidden, self.model.head)


def tied(task_class: type[Task], first: str, second: str) -> Callable[[Make, Path], Outcome]:
    """Prune a weight that two layers share; load the checkpoint into the plain network."""

    def check(make: Make, folder: Path) -> Outcome:
        task, plain = task_class(), task_class()
        fit(task, make(), folder=folder)
        plain.load_state_dict(torch.load(folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"])
        still = task.get_parameter(first) is task.get_parameter(second)
        outcome = half([*task.from_epoch(1), sparsity(task.weights()), sparsity(plain.weights())])
        return Outcome(outcome.right and still, f"{outcome.text}; {'still' if still else 'no longer'} tied")

    return check


def frozen(make: Make, _: Path) -> Outcome:
    """Prune a network with a frozen layer: an error that names it, or a layer as it was."""
    task = Task()
    layer = task.layers[1].requires_grad_(False)
    before = layer.weight.detach().clone()
    try:
        fit(task, make())
    except Exception as error:
        return Outcome("'3'" in str(error), first_line(error))
    changed = float((layer.weight != before).double().mean())
    return Outcome(changed == 0, f"no error; {changed:.0%} of the frozen weights changed")


def lazy(make: Make, _: Path) -> Outcome:
    """Prune a network with a layer that is not built yet: an error that names it, or all layers pruned."""
    task = Task()
    task.model[6] = nn.LazyLinear(10)
    task.layers = tuple(task.model[index] for index in LAYERS)
    try:
        fit(task, make())
    except Exception as error:
        return Outcome("'6'" in str(error), first_line(error))
    return half([sparsity(task.weights())])


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}".replace("|", "\\|")


def ranks(task_class: type[Task]) -> Callable[[Make, Path], Outcome]:
    """Prune at random in two processes with different seeds."""

    def check(make: Make, folder: Path) -> Outcome:
        worker = ["--worker", make.__name__, task_class.__name__, str(folder)]
        done = subprocess.run([sys.executable, __file__, *worker], capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
        masks = float(((first == 0) != (second == 0)).double().mean())
        weights = float((first != second).double().mean())
        return Outcome(masks == weights == 0, f"masks differ at {masks:.1%} of the positions, weights at {weights:.1%}")

    return check


def one_rank(make: Make, task: Task, folder: Path) -> None:
    """Fit in one of two processes and save its weights."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    fit(task, make("random_unstructured"), seed=1 + rank, devices=2, strategy="ddp", max_epochs=2)
    torch.save(torch.cat([weight.detach().flatten() for weight in task.weights()]), folder / f"rank{rank}.pt")


CHECKS: dict[str, Callable[[Make, Path], Outcome]] = {
    "defaults: 0.5 for four epochs": compounding,
    "defaults: biases and norms": biases_and_norms,
    "resume after the decision": resuming,
    "the same, make_pruning_permanent=False": resuming_not_permanent,
    "a buffer called causal_mask": causal_mask,
    "EMAWeightAveraging first": averaging(Task, first=True, names=("weight",)),
    "EMAWeightAveraging last": averaging(Task, first=False, names=("weight",)),
    "first, no norm, ModelPruning with biases": averaging(NoNorm, first=True, names=("weight", "bias")),
    "last, no norm, ModelPruning with biases": averaging(NoNorm, first=False, names=("weight", "bias")),
    "random pruning, two ranks, two seeds": ranks(Task),
    "the same, network without norm": ranks(NoNorm),
    "manual optimization, two optimizers": trained(Turns),
    "gradient accumulation": trained(Task, accumulate_grad_batches=3),
    "gradient clipping": clipping,
    "bf16 mixed precision": trained(Task, precision="bf16-mixed"),
    "momentum and weight decay": trained(Task),
    "network.compile()": compiled_network,
    "torch.compile(network)": wrapped_network,
    "torch.compile(LightningModule)": compiled_module,
    "two tied layers": tied(Tied, "model.1.weight", "model.3.weight"),
    "a head tied to an embedding": tied(TiedHead, "model.embedding.weight", "model.head.weight"),
    "a frozen layer": frozen,
    "a layer not built yet": lazy,
}


def cell(check: Callable[[Make, Path], Outcome], make: Make) -> str:
    """Run one check with one callback."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = check(make, Path(folder))
        except Exception as error:
            outcome = Outcome(False, first_line(error).replace(folder, "..."))
    return f"{'right' if outcome.right else '**wrong**'}: {outcome.text}"


def main() -> None:
    """Run every check with both, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=3, metavar=("CALLBACK", "TASK", "FOLDER"), help="used for the second process")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.worker:
        make, task, folder = arguments.worker
        one_rank({"lightning": lightning, "ours": ours}[make], {"Task": Task, "NoNorm": NoNorm}[task](), Path(folder))
        return
    rows = []
    for name, check in CHECKS.items():
        rows.append({"situation": name, "ModelPruning": cell(check, lightning), "WeightPruning": cell(check, ours)})
        print(rows[-1], flush=True)
    wrong = {key: sum(row[key].startswith("**") for row in rows) for key in ("ModelPruning", "WeightPruning")}
    body = (
        f"lightning {L.__version__}. Half of the weights are to go, once; four epochs on 256 digits. Wrong, of"
        f" {len(rows)}: {wrong['ModelPruning']} with ModelPruning, {wrong['WeightPruning']} with WeightPruning.\n\n"
        f"{markdown(rows)}"
    )
    write_section("Lightning's ModelPruning", command="python benchmarks/lightning_model_pruning.py", body=body)


if __name__ == "__main__":
    main()
