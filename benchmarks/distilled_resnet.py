"""ResNet-8 of MLPerf Tiny and ResNet-20 on CIFAR-10: trained alone, and with a pretrained ResNet-56 as their teacher.

Both start from the same random weights and train for as many epochs at the same learning rates; 5,000 training images
are kept back for validation, and the test images are read once, by the files. Each network is then quantized after its
training (recipe=ptq_int8), and the int8 .pte is run on all 10,000 test images; MLPerf Tiny asks 85 % of ResNet-8.

Run: python benchmarks/distilled_resnet.py --data cifar10.npz --weights resnet56-4bfd9763.th --model resnet8
A run that is cut goes on where it was; a row is written as soon as its seed is done.
"""

import argparse
from pathlib import Path
from typing import Any

from runs import folder_of, parser_of, publish, run_recipe

TITLES = {"resnet8": "ResNet-8", "resnet20": "ResNet-20"}
QUALITY_TARGET = 85.0
COMMON = ("data=cifar10", "trainer.precision=bf16-mixed")


def train(seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the report on a network that was trained alone, and with its teacher."""
    overrides = [
        "recipe=distill",
        *COMMON,
        f"model={arguments.model}",
        "distillation=resnet56",
        f"distillation.teacher.checkpoint={arguments.weights.resolve()}",
        f"data.path={arguments.data.resolve()}",
        f"seed={seed}",
        f"trainer.max_epochs={arguments.epochs}",
    ]
    return run_recipe(folder, overrides, trial=arguments.trial)


def int8_error(checkpoint: Path, seed: int, arguments: argparse.Namespace) -> float:
    """Return the test error in % of the .pte of a trained network, quantized after its training."""
    overrides = ["recipe=ptq_int8", *COMMON, f"model={arguments.model}", f"data.path={arguments.data.resolve()}"]
    overrides += [f"seed={seed}", f"baseline={checkpoint}"]
    overrides += ["trainer.precision=32-true", "callbacks.export.min_agreement=0.9"]
    folder = checkpoint.parent / f"int8_{checkpoint.stem}"
    if arguments.trial:
        overrides.append("callbacks.export.min_agreement=0")
    report = run_recipe(folder, overrides)
    return next(error(row) for row in report["artifacts"] if row["file"] == "model.pte")


def error(row: dict[str, Any]) -> float:
    """Return the test error in %."""
    return float(row["error"]["error_percent"])


def slope(report: dict[str, Any], stage: str) -> str:
    """Return how the validation error moved lately: mean of the last five epochs against that of the five before."""
    errors = [100 * row["val_error"] for row in report["history"] if row["stage"] == stage and row["val_error"]]
    if len(errors) < 10:
        return ""
    return f"{sum(errors[-5:]) / 5 - sum(errors[-10:-5]) / 5:+.2f}"


def rows_of(seed: int, report: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Return the two lines of one seed."""
    rows = []
    alone, taught = error(report["baseline"]), error(report["artifacts"][0])
    for name, stage, checkpoint, dense in (
        ("alone", "dense", "baseline.ckpt", alone),
        ("ResNet-56", "compression", "last.ckpt", taught),
    ):
        int8 = 100 - int8_error(folder / checkpoint, seed, arguments)
        row = {
            "seed": str(seed),
            "teacher": name,
            "test, %": f"{100 - dense:.2f}",
            "gain, points": "" if name == "alone" else f"{alone - taught:+.2f}",
            "int8 .pte, %": f"{int8:.2f}",
        }
        if arguments.model == "resnet8":
            row["MLPerf Tiny's 85 %"] = "reached" if int8 >= QUALITY_TARGET else "missed"
        rows.append(row | {"validation error, last 5 epochs against the 5 before": slope(report, stage)})
    return rows


def main() -> None:
    """Run what is missing; write each row as soon as it is there."""
    parser = parser_of(__doc__, folder="outputs/benchmarks/distilled", weights="ResNet-56")
    parser.add_argument("--model", choices=tuple(TITLES), default="resnet8")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        folder = folder_of(arguments) / arguments.model / f"seed_{seed}"
        rows += rows_of(seed, train(seed, arguments, folder), arguments, folder)
        publish(
            f"{TITLES[arguments.model]}, CIFAR-10, distilled",
            rows,
            command="python benchmarks/distilled_resnet.py --data cifar10.npz --weights resnet56-4bfd9763.th"
            f" --model {arguments.model} --epochs {arguments.epochs} --seeds {' '.join(map(str, arguments.seeds))}",
            text=f"{arguments.epochs} epochs each, batch 128, bf16 autocast, 45,000 training images, from scratch; soft"
            " targets at temperature 4 with weight 0.9, 0.1 for the labels; model.onnx in onnxruntime, .pte in"
            " ExecuTorch, quantized after training.",
            trial=arguments.trial,
        )


if __name__ == "__main__":
    main()
