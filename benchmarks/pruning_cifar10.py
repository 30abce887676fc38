"""ResNet-20 on CIFAR-10 from pretrained weights, pruned in every way: accuracy after at most five epochs, and latency.

The published weights have seen all 50,000 training images, so settings were chosen on the test images 0 to 4,999
("validation"); what is reported is the accuracy on 5,000 to 9,999 ("test"), and on all 10,000 beside it.

Run: python benchmarks/pruning_cifar10.py --data cifar10.npz --weights resnet20-12fca82f.th
A run that is cut goes on where it was; finished ones are not repeated. `--only NAME` runs some, `--latency` times the
exported networks (nothing else should run then). Fine-tuning is by the labels and by the dense network's own outputs.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from results import markdown, write_section
from runs import run_recipe

from lightning_edge import load_artifact
from lightning_edge.data import CIFAR10DataModule
from lightning_edge.export.timing import ratio, time_sessions

COMMON = (
    "model=resnet20",
    "data=cifar10",
    "data.validation_from=test",
    "trainer.precision=bf16-mixed",
    "distillation=self",
)
IN_STEPS = ("end_epoch=null", "end_step=500", "every=50")  # gradually, over the first 1.3 epochs


@dataclass(frozen=True)
class Entry:
    """One way to prune: its row's name and the command line's overrides."""

    name: str
    title: str
    overrides: tuple[str, ...]
    epochs: int
    channels: bool = False


def unstructured(sparsity: float, epochs: int) -> Entry:
    """Return the entry of one unstructured sparsity."""
    return Entry(
        f"unstructured_{sparsity:g}",
        f"unstructured, {sparsity:.0%}",
        (
            "recipe=prune_weights",
            f"callbacks.pruning.sparsity={sparsity}",
            *(f"callbacks.pruning.{o}" for o in IN_STEPS),
        ),
        epochs,
    )


def channels(macs: float) -> Entry:
    """Return the entry of one fraction of the multiply-accumulates that stay."""
    epochs, end_step, remove_epoch = (5, 400, 2) if macs == 0.5 else (2, 350, 1)
    return Entry(
        f"channels_{macs:g}",
        f"channels, {1 - macs:.0%} of the MACs removed",
        (
            "recipe=prune_channels",
            f"callbacks.channels.macs={macs}",
            f"callbacks.channels.round_to={8 if macs >= 0.5 else 4}",  # multiples of 8 do not reach further down
            "callbacks.channels.score=taylor",
            "callbacks.channels.end_epoch=null",
            "callbacks.channels.start_step=50",
            f"callbacks.channels.end_step={end_step}",
            "callbacks.channels.every=50",
            f"callbacks.channels.remove_epoch={remove_epoch}",
            "export.formats=[onnx,pte]",
        ),
        epochs,
        channels=True,
    )


ENTRIES = (
    *(unstructured(sparsity, epochs) for sparsity, epochs in ((0.5, 2), (0.7, 2), (0.8, 5), (0.9, 2))),
    Entry("pattern_2to4", "2:4", ("recipe=prune_2to4", *(f"callbacks.pruning.{o}" for o in IN_STEPS)), 3),
    *(channels(macs) for macs in (0.7, 0.5, 0.3)),
)


def run(entry: Entry, *, data: Path, weights: Path, folder: Path) -> None:
    """Run one recipe from the command line, or go on with it."""
    paths = (f"data.path={data}", f"baseline={weights}")
    run_recipe(folder, [*entry.overrides, f"trainer.max_epochs={entry.epochs}", *COMMON, *paths])


def right(path: Path, data: CIFAR10DataModule) -> list[torch.Tensor]:
    """Return which images of the validation and the test part the file labels correctly."""
    session = load_artifact(path, threads=2)
    answers = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        parts = [torch.from_numpy(session(images.numpy())).argmax(1) == labels for images, labels in loader]
        answers.append(torch.cat(parts))
    return answers


def accuracy_row(title: str, path: Path, data: CIFAR10DataModule, dense: float | None) -> dict[str, str]:
    """Return one row of the table of accuracies."""
    validation, test = right(path, data)
    accuracy = 100 * float(test.float().mean())
    return {
        "pruning": title,
        "test, %": f"{accuracy:.2f}",
        "against dense, points": "" if dense is None else f"{accuracy - dense:+.2f}",
        "all 10,000, %": f"{100 * float(torch.cat([validation, test]).float().mean()):.2f}",
        "validation, %": f"{100 * float(validation.float().mean()):.2f}",
    }


def main() -> None:
    """Train what is missing, then write the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz, or its original folder")
    parser.add_argument("--weights", type=Path, required=True, help="pretrained ResNet-20")
    parser.add_argument("--only", nargs="*", choices=[entry.name for entry in ENTRIES], help="train these, and stop")
    parser.add_argument("--latency", action="store_true", help="time the networks that lost channels, and stop")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/pruning_cifar10"))
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    command = "python benchmarks/pruning_cifar10.py --data cifar10.npz --weights resnet20-12fca82f.th"
    if arguments.latency:
        latency(folder, command=f"{command} --latency")
        return
    for entry in ENTRIES:
        if not arguments.only or entry.name in arguments.only:
            run(entry, data=arguments.data.resolve(), weights=arguments.weights.resolve(), folder=folder / entry.name)
    if not arguments.only:
        accuracies(folder, data=arguments.data, command=command)


def accuracies(folder: Path, *, data: Path, command: str) -> None:
    """Write the accuracy of every exported file."""
    images = CIFAR10DataModule(path=data, validation_from="test", batch_size=500)
    images.setup()
    baseline = next(folder.glob("*/baseline.onnx"))  # the same in every run
    dense = 100 * float(right(baseline, images)[1].float().mean())
    rows = [accuracy_row("none (dense)", baseline, images, None)]
    for entry in (entry for entry in ENTRIES if (folder / entry.name / "report.json").exists()):
        report = json.loads((folder / entry.name / "report.json").read_text())
        row = accuracy_row(entry.title, folder / entry.name / "model.onnx", images, dense)
        last = report["artifacts"][-1]
        computed = {"MACs, M": f"{last['macs'] / 1e6:.1f}", "non-zero": f"{last['effective_macs'] / 1e6:.1f}"}
        rows.append(row | {"epochs": str(entry.epochs)} | computed)
    rows[0] |= {"epochs": "0", "MACs, M": f"{report['baseline']['macs'] / 1e6:.1f}", "non-zero": ""}
    body = (
        f"Up to 5 epochs, batch 128, bf16 autocast, the dense network itself as teacher, from"
        " the published weights; model.onnx in onnxruntime. Test: "
        f"images 5,000 to 9,999 of the test set; validation, on which settings were chosen: 0 to 4,999.\n\n"
        f"{markdown(rows)}"
    )
    write_section("ResNet-20, CIFAR-10, pruned", command=command, body=body)


def latency(folder: Path, *, command: str) -> None:
    """Write how long the networks that lost channels take, against the dense one, in both runtimes."""
    inputs = [torch.rand(1, 3, 32, 32).numpy()]
    rows = []
    for suffix, runtime in (("onnx", "onnxruntime"), ("pte", "ExecuTorch")):
        entries = [entry for entry in ENTRIES if entry.channels and (folder / entry.name / "report.json").exists()]
        sessions = {"dense": load_artifact(folder / entries[0].name / f"baseline.{suffix}", threads=1)}
        sessions |= {e.title: load_artifact(folder / e.name / f"model.{suffix}", threads=1) for e in entries}
        timed = time_sessions(sessions, inputs, blocks=60, calls_per_block=200, seconds=120)
        for name, measured in timed.items():
            times = ratio(measured, timed["dense"])
            rows.append(
                {
                    "network": name,
                    "runtime": runtime,
                    "p50, ms": f"{measured.p50_ms:.3f}",
                    "times faster than dense": f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})",
                }
            )
    body = (
        "model.onnx and model.pte, fp32, one thread, batch 1; blocks of calls take turns, the ratio is the median over "
        f"the blocks with its 95 % interval.\n\n{markdown(rows)}"
    )
    write_section("ResNet-20, CIFAR-10, latency after channels were removed", command=command, body=body)


if __name__ == "__main__":
    main()
