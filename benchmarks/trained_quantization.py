"""ResNet-20 on CIFAR-10, trained with quantized numbers from pretrained weights: int8, 4-bit weights, pruned and int8.

The published weights have seen all 50,000 training images, so settings were chosen on the test images 0 to 4,999
("validation"); what is reported is the accuracy of the exported files on 5,000 to 9,999, and on all 10,000 beside it.

Run: python benchmarks/trained_quantization.py --data cifar10.npz --weights resnet20-12fca82f.th
A run that is cut goes on where it was; a row is written as soon as its run is done, means of the seeds that are there.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import onnx
from cifar10 import accuracy_percent, images
from runs import folder_of, parser_of, publish, run_recipe

from lightning_edge.data import CIFAR10DataModule

COMMAND = "python benchmarks/trained_quantization.py --data cifar10.npz --weights resnet20-12fca82f.th"
WEIGHTS = 268_336  # of the layers of ResNet-20
COMMON = (
    "model=resnet20",
    "data=cifar10",
    "data.validation_from=test",
    "distillation=self",
    "callbacks.quantization.calibration_batches=16",
    "trainer.precision=bf16-mixed",
)


@dataclass(frozen=True)
class Entry:
    """One way to train: its row's name, the command line's overrides, and how long."""

    title: str
    name: str
    overrides: tuple[str, ...]
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)


ENTRIES = (
    Entry(
        "int8",
        "int8",
        (
            "recipe=qat_int8",
            "callbacks.quantization.start_epoch=0",
            "callbacks.quantization.freeze_observers_epoch=0",
            "model.optimizer.lr=0.002",
        ),
        epochs=1,
    ),
    Entry(
        "4-bit weights, int8 activations",
        "int4",
        ("recipe=int4_weights", "model.optimizer.lr=0.02"),
        epochs=4,
    ),
    Entry(
        "80% pruned, then int8",
        "pruned",
        (
            "recipe=qat_int8",
            "callbacks=[default,pruning,quantization,export]",
            "callbacks.pruning.sparsity=0.8",
            "callbacks.pruning.end_epoch=1",
            "callbacks.quantization.start_epoch=2",
            "callbacks.quantization.freeze_observers_epoch=2",
            "model.optimizer.lr=0.02",
        ),
        epochs=3,
        seeds=(0,),
    ),
)


def zeros_of(path: Path) -> str:
    """Return the zeros among the int8 weights of an ONNX file, with those of units that went as they were all zero."""
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    zeros, gone = sum(int((weight == 0).sum()) for weight in weights), WEIGHTS - sum(weight.size for weight in weights)
    return f"{zeros:,} and {gone:,} removed, {(zeros + gone) / WEIGHTS:.3%}"


def mean(values: list[float]) -> str:
    """Return the mean of the seeds with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def row(entry: Entry, folders: list[Path], suffix: str, data: CIFAR10DataModule) -> dict[str, str]:
    """Return the row of one kind of file."""
    found = [accuracy_percent(folder / f"model.{suffix}", data) for folder in folders]
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    checked = [a["verified"] for r in reports for a in r["artifacts"] if a["file"] == f"model.{suffix}"]
    return {
        "trained": entry.title,
        "epochs": str(entry.epochs),
        "seeds": ", ".join(str(seed) for seed in entry.seeds[: len(folders)]),
        "file": f".{suffix}",
        "5,000 to 9,999, %": mean([test for _, test, _ in found]),
        "all 10,000, %": mean([everything for _, _, everything in found]),
        "0 to 4,999 (to choose by), %": mean([validation for validation, _, _ in found]),
        "labels as the converted graph": f"{sum(v['agreeing'] for v in checked):,}/{sum(v['rows'] for v in checked):,}",
        "bytes": f"{max((folder / f'model.{suffix}').stat().st_size for folder in folders):,}",
        "zeros in the int8 weights": zeros_of(folders[0] / "model.onnx"),
    }


def main() -> None:
    """Train what is missing; write the section anew after every run."""
    parser = parser_of(__doc__, folder="outputs/benchmarks/trained_quantization", weights="ResNet-20")
    parser.add_argument("--only", nargs="*", choices=[entry.name for entry in ENTRIES], help="train these alone")
    arguments: argparse.Namespace = parser.parse_args()
    folder, data = folder_of(arguments), images(arguments.data)
    paths = (f"data.path={arguments.data.resolve()}", f"baseline={arguments.weights.resolve()}")
    done: dict[str, list[Path]] = {}
    for entry in ENTRIES:
        for seed in entry.seeds:
            where = folder / f"{entry.name}_{seed}"
            if arguments.only and entry.name not in arguments.only and not (where / "report.json").exists():
                continue
            overrides = [*entry.overrides, *COMMON, *paths, f"trainer.max_epochs={entry.epochs}", f"seed={seed}"]
            run_recipe(where, overrides, trial=arguments.trial)
            done.setdefault(entry.name, []).append(where)
            rows = [row(e, done[e.name], s, data) for e in ENTRIES if e.name in done for s in ("onnx", "pte")]
            publish(
                "ResNet-20, CIFAR-10, trained with quantized numbers",
                rows,
                command=COMMAND,
                text="From the published weights, the dense network itself as teacher, batch 128, bf16 autocast;"
                " exported files in their runtimes, dense 91.96 % on the images 5,000 to 9,999, 91.73 % on all. Means"
                " of the seeds with their standard error.",
                trial=arguments.trial,
            )


if __name__ == "__main__":
    main()
