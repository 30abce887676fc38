"""ResNet-20 on CIFAR-10 for an edge device: edge_tiny by sizes, edge_int8 by latencies.

The published weights have seen all 50,000 training images, so settings were chosen on the test images 0 to 4,999
("validation"); whole files are counted; the fp32 weights have 1,078,888 bytes, and 91.73 % of all 10,000.

Run: python benchmarks/edge_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th
A run that is cut goes on where it was; a row is written as soon as its run is done. `--latency` times the integer
networks against the dense one in the same runtime (nothing else should run then).
"""

import argparse
from pathlib import Path

import torch
from cifar10 import accuracy_percent, images
from runs import folder_of, parser_of, publish, run_recipe

from lightning_edge import load_artifact
from lightning_edge.data import CIFAR10DataModule
from lightning_edge.export.timing import ratio, time_sessions

DENSE_PERCENT, DENSE_BYTES = 91.73, 1_078_888
COMMON = ("model=resnet20", "data=cifar10", "data.validation_from=test", "trainer.precision=bf16-mixed")
COMMAND = "python benchmarks/edge_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th"
SIZES = {53_900: 0.8, 45_000: 0.8, 36_000: 0.8, 28_000: 0.9}
"""Budgets of bytes, and the zeros of each: the places of the other weights alone take 24 KB at 80 %, 16 KB at 90 %."""
MACS = (0.5, 0.4)
TINY_EPOCHS, FAST_EPOCHS = 8, 14


def tiny(max_bytes: int) -> list[str]:
    """Return the overrides of one point of the curve: most weights go, the price of a bit makes the others fit."""
    return [
        "recipe=edge_tiny",
        f"targets.sparsity={SIZES[max_bytes]}",
        "callbacks.pruning.end_epoch=2",
        "callbacks.sharing.clusters=32",
        "callbacks.sharing.channel_scale=true",
        "callbacks.sharing.at_epochs=[2]",
        "callbacks.sharing.reassign_every=1",
        "callbacks.sharing.freeze_epoch=6",
        "callbacks.sharing.rate=0.0",
        f"callbacks.sharing.max_bytes={max_bytes}",
    ]


def fast(macs: float) -> list[str]:
    """Return the overrides of one integer network: channels go in the first epoch, by Taylor scores.

    Then the narrow network learns in float, at a learning rate that lets it move, and the last two of 14 epochs are
    with quantized numbers. When channels went slowly, and the last half of 8 epochs was quantized, at a learning rate
    of 0.02, half of the multiply-accumulates cost 3 points instead of one.
    """
    return [
        "recipe=edge_int8",
        "model.optimizer.lr=0.05",
        f"callbacks.channels.macs={macs}",
        "callbacks.channels.score=taylor",
        "callbacks.channels.end_epoch=null",
        "callbacks.channels.start_step=50",
        "callbacks.channels.end_step=400",
        "callbacks.channels.every=50",
    ]


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is missing; write each row as soon as it is there."""
    folder, trial, data = folder_of(arguments), arguments.trial, images(arguments.data)
    paths = [f"data.path={arguments.data.resolve()}", f"baseline={arguments.weights.resolve()}"]
    tiny_epochs, fast_epochs = arguments.epochs or TINY_EPOCHS, arguments.epochs or FAST_EPOCHS
    rows: list[dict[str, str]] = []
    for max_bytes in SIZES if "tiny" in arguments.only else ():
        where = folder / f"tiny_{max_bytes}"
        run_recipe(where, [*COMMON, *tiny(max_bytes), *paths, f"trainer.max_epochs={tiny_epochs}"], trial=trial)
        path = where / "model.edge"
        size = path.stat().st_size
        head = {
            "budget": f"{max_bytes:,}",
            "zeros": f"{SIZES[max_bytes]:.0%}",
            "bytes": f"{size:,}",
            "times smaller": f"{DENSE_BYTES / size:.1f}",
        }
        rows.append(head | _accuracies(path, data))
        publish(
            "ResNet-20, CIFAR-10, the smallest file",
            rows,
            command=COMMAND,
            text=f"recipe=edge_tiny, 32 values a layer with a scale per output channel, codes trained to a"
            f" budget of bytes, {tiny_epochs} epochs, batch 128, bf16 autocast, from the published weights; model.edge,"
            " whole file. The bar: 20 times smaller within 1.5 points.",
            trial=trial,
        )
    rows = []
    for macs in MACS if "int8" in arguments.only else ():
        where = folder / f"int8_{macs:g}"
        settings = [*fast(macs), f"trainer.max_epochs={fast_epochs}"]
        report = run_recipe(where, [*COMMON, *settings, *paths], trial=trial)
        for suffix in ("onnx", "pte"):
            row = next(row for row in report["artifacts"] if row["file"] == f"model.{suffix}")
            head = {
                "MACs that stay": f"{macs:.0%}",
                "file": f".{suffix}, int8",
                "MACs, M": f"{row['macs'] / 1e6:.1f}",
                "bytes": f"{row['size_bytes']:,}",
            }
            rows.append(head | _accuracies(where / f"model.{suffix}", data))
        publish(
            "ResNet-20, CIFAR-10, the fastest file",
            rows,
            command=COMMAND,
            text=f"recipe=edge_int8, Taylor scores, learning rate 0.05, {fast_epochs} epochs, the last two of them with"
            " quantized numbers, batch 128, bf16 autocast, from the published weights.",
            trial=trial,
        )


def _accuracies(path: Path, data: CIFAR10DataModule) -> dict[str, str]:
    validation, test, everything = accuracy_percent(path, data)
    return {
        "all 10,000, %": f"{everything:.2f}",
        "against dense, points": f"{everything - DENSE_PERCENT:+.2f}",
        "images 5,000 to 9,999, %": f"{test:.2f}",
        "validation, %": f"{validation:.2f}",
    }


def latency(arguments: argparse.Namespace) -> None:
    """Write how long the integer networks take, against the dense one, in both runtimes."""
    folder, inputs, rows = folder_of(arguments), [torch.rand(1, 3, 32, 32).numpy()], []
    done = {macs: folder / f"int8_{macs:g}" for macs in MACS if (folder / f"int8_{macs:g}" / "report.json").exists()}
    for suffix in ("onnx", "pte"):
        files = {"dense, fp32": next(iter(done.values())) / f"baseline.{suffix}"}
        files |= {f"int8, {macs:.0%} of the MACs": where / f"model.{suffix}" for macs, where in done.items()}
        sessions = {name: load_artifact(path, threads=1) for name, path in files.items()}
        timed = time_sessions(sessions, inputs, blocks=60, calls_per_block=200, seconds=120)
        for name, measured in timed.items():
            times = ratio(measured, timed["dense, fp32"])
            rows.append(
                {
                    "network": name,
                    "runtime": measured.runtime,
                    "p50, ms": f"{measured.p50_ms:.3f}",
                    "times faster than dense": f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})",
                }
            )
    publish(
        "ResNet-20, CIFAR-10, latency of the fastest files",
        rows,
        command=f"{COMMAND} --latency",
        text="One thread, batch 1, against the dense fp32 network in the same runtime; blocks of calls take turns, the"
        " ratio is the median over the blocks with its 95 % interval.",
        trial=arguments.trial,
    )


def main() -> None:
    """Train, or time what was trained."""
    parser = parser_of(__doc__, folder="outputs/benchmarks/edge_resnet20", weights="ResNet-20")
    parser.add_argument("--epochs", type=int, help=f"default: {TINY_EPOCHS} and {FAST_EPOCHS}")
    parser.add_argument("--only", nargs="*", choices=("tiny", "int8"), default=("tiny", "int8"), help="train these")
    parser.add_argument("--latency", action="store_true", help="time the integer networks, and stop")
    arguments = parser.parse_args()
    (latency if arguments.latency else run_all)(arguments)


if __name__ == "__main__":
    main()
