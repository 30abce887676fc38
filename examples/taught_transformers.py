"""Distillation beyond images and classes: a small transformer encoder tags tokens and predicts a number, by a teacher.

The sequences have different lengths and are padded; padded tokens are in no loss. The students see labels of which many
are wrong; the teacher, a larger encoder, was trained on the true ones. Everything is plain torch and Lightning, but for
the DistillationModule around the student.

Run: python examples/taught_transformers.py
"""

import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import DistillationModule, DistillationTerm

LENGTH, FEATURES, TAGS, PADDED = 12, 6, 4, -100
WRONG = 0.5  # fraction of the students' labels, and the noise of their numbers

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (batch, length, features), padding (batch, length), targets


class Encoder(nn.Module):
    """A transformer encoder, with one answer for each token or, pooled, for the sequence.

    Args:
        width: Of the tokens inside.
        outputs: Of each answer.
        pooled: Whether the answer is the mean over the tokens that are not padded.
    """

    def __init__(self, width: int, outputs: int, *, pooled: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(FEATURES, width)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)
        self.pooled = pooled

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Return (batch, length, outputs), or (batch, outputs) if pooled; padding is True where there is no token."""
        answers: Tensor = self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding))
        if not self.pooled:
            return answers
        kept = (~padding).unsqueeze(2)
        return (answers * kept).sum(1) / kept.sum(1)


class Task(L.LightningModule):
    """Any LightningModule can be a student; this one has a loss over its targets.

    Args:
        network: Maps tokens and padding to answers.
        loss: Of answers and targets.
    """

    def __init__(self, network: Encoder, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        tokens, padding, targets = batch
        return self.loss(self.network(tokens, padding), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def tagging_loss(answers: Tensor, tags: Tensor) -> Tensor:
    """Return the cross entropy over all tokens that are not padded."""
    return F.cross_entropy(answers.flatten(0, 1), tags.flatten(), ignore_index=PADDED)


def kept_tokens(output: Tensor, batch: Batch) -> Tensor:
    """Return the answers for the tokens that are not padded, shape (tokens, tags): what the teacher is compared on."""
    return output[~batch[1]]


def sequences(count: int, *, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return sequences with the true tag of each token, and the same ones with the number that is theirs.

    A tag depends on the token and on the mean of its sequence; the number is of the mean alone.
    """
    draw = torch.Generator().manual_seed(seed)
    rule = torch.randn(2, FEATURES, TAGS, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(count, LENGTH, FEATURES, generator=draw)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count, 1), generator=draw)
    padding = torch.arange(LENGTH) >= lengths
    tokens[padding] = 0.0
    mean = tokens.sum(1, keepdim=True) / lengths.unsqueeze(2)
    tags = (tokens @ rule[0] + 3 * mean @ rule[1]).argmax(2).masked_fill(padding, PADDED)
    numbers = (3 * mean.squeeze(1) @ rule[1][:, :1]).tanh()
    return TensorDataset(tokens, padding, tags), TensorDataset(tokens, padding, numbers)


def spoilt(data: TensorDataset, *, seed: int) -> TensorDataset:
    """Return the data as the students see them: half of the tags drawn anew, or numbers with noise."""
    draw = torch.Generator().manual_seed(seed)
    tokens, padding, targets = data.tensors
    if targets.is_floating_point():
        return TensorDataset(tokens, padding, targets + WRONG * torch.randn(targets.shape, generator=draw))
    drawn = torch.randint(0, TAGS, targets.shape, generator=draw)
    is_wrong = (torch.rand(targets.shape, generator=draw) < WRONG) & ~padding
    return TensorDataset(tokens, padding, torch.where(is_wrong, drawn, targets))


def fit(module: L.LightningModule, data: TensorDataset, *, epochs: int) -> None:
    """Train a module."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, 32, shuffle=True))


@torch.no_grad()
def error(network: Encoder, data: TensorDataset) -> float:
    """Return the fraction of wrong tags, or the mean squared error of the numbers."""
    tokens, padding, targets = data.tensors
    answers = network.eval()(tokens, padding)
    if network.pooled:
        return float(F.mse_loss(answers, targets))
    return float((answers.argmax(2) != targets)[~padding].float().mean())


def compare(kind: str) -> dict[str, float]:
    """Return the test errors of the teacher, and of two equal students trained alone and with the teacher."""
    L.seed_everything(0, verbose=False)
    place = ("tags", "numbers").index(kind)
    loss = (tagging_loss, F.mse_loss)[place]
    make = partial(Encoder, outputs=(TAGS, 1)[place], pooled=kind == "numbers")
    known, train, test = (sequences(count, seed=seed)[place] for seed, count in enumerate((2048, 256, 1024), start=1))
    teacher, student = make(32), make(16)
    fit(Task(teacher, loss), known, epochs=12)
    losses = {
        "tags": {"soft": DistillationTerm("soft_targets", weight=0.9, temperature=2.0)},
        "numbers": {"values": DistillationTerm("squared", weight=0.9)},
    }
    alone = Task(copy.deepcopy(student), loss)
    taught = DistillationModule(
        Task(student, loss),
        teacher,
        losses[kind],
        task_weight=0.1,
        output_adapter=kept_tokens if kind == "tags" else None,
    )
    for module in (alone, taught):
        L.seed_everything(1, verbose=False)
        fit(module, spoilt(train, seed=4), epochs=25)
    networks = {"teacher": teacher, "alone": alone.network, "taught": student}
    return {name: error(network, test) for name, network in networks.items()}


def main() -> None:
    """Print both comparisons, and hold distillation to them."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for kind, unit in (("tags", "wrong tags"), ("numbers", "mean squared error")):
        errors = compare(kind)
        print(kind, unit, {name: round(value, 3) for name, value in errors.items()})
        assert errors["taught"] < 0.9 * errors["alone"], "the teacher did not help"


if __name__ == "__main__":
    main()
