"""Deep Compression's own table (Han et al. 2016, tables 1 to 3): both LeNets on MNIST, by one recipe each.

Seeds 0, 1 and 2, and no others; whole files counted; 5,000 training images are kept back for validation, on which
settings were chosen; the test images are read once, by the file itself, at the end of each run. A run that is cut goes
on where it was. `--claim edge_tiny` goes beyond the paper: the dense network, or a larger one, teaches the compressed
one. `--claim smallest` has the smallest files that others have published as its bars: EPR (Oktay et al. 2020,
arXiv:1906.06624) for LeNet-300-100 and MIRACLE (Havasi et al. 2019, arXiv:1810.00440) for LeNet-5.

Run: python benchmarks/deep_compression_mnist.py --data mnist.npz
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from results import markdown, write_section
from runs import run_recipe

from lightning_edge.artifact import Inspection, inspect

SEEDS = (0, 1, 2)
NAMES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}


@dataclass(frozen=True)
class Bar:
    """What one network has to reach: the largest file and the mean error; and what it is measured by."""

    largest_bytes: int
    error_percent: float
    other: str


@dataclass(frozen=True)
class Claim:
    """A recipe, what it has to reach with each network, and what the command line adds for it."""

    title: str
    recipe: str
    others: str
    bars: Mapping[str, Bar]
    overrides: Mapping[str, tuple[str, ...]]


PAPER = {"lenet300": "1.58 %, 27 KB", "lenet5": "0.74 %, 44 KB"}
# a teacher of 2 x 1200 units; settings were chosen by seed 0's validation error
TAUGHT = (
    "trainer.max_epochs=60",
    "callbacks.sharing.rate=0.0",
    "distillation=larger",
    "+larger.trainer.max_epochs=20",
)
CLAIMS = {
    # 1/40 and 1/39 of the fp32 weights, as in the paper
    "deep_compression": Claim(
        "Deep Compression on MNIST",
        "deep_compression",
        "the paper",
        {"lenet300": Bar(26_661, 1.58, PAPER["lenet300"]), "lenet5": Bar(44_213, 0.74, PAPER["lenet5"])},
        dict.fromkeys(("lenet300", "lenet5"), ("~distillation", "trainer.gradient_clip_val=null")),  # as the paper
    ),
    # 1/100 and 1/200
    "edge_tiny": Claim(
        "Beyond Deep Compression on MNIST",
        "edge_tiny",
        "the paper",
        {"lenet300": Bar(10_664, 1.58, PAPER["lenet300"]), "lenet5": Bar(8_621, 0.74, PAPER["lenet5"])},
        {
            "lenet300": (*TAUGHT, "targets.sparsity=0.968"),
            "lenet5": ("trainer.max_epochs=40", "targets.sparsity=0.985", "callbacks.sharing.rate=0.0"),
        },
    ),
    "smallest": Claim(
        "The smallest files on MNIST",
        "edge_tiny",
        "others",
        {
            "lenet300": Bar(8_560, 1.9, "EPR: 1.9 %, 8.56 KB"),
            "lenet5": Bar(3_030, 0.69, "MIRACLE: 0.69 %, 3.03 KB"),
        },
        {
            "lenet300": (*TAUGHT, "targets.sparsity=0.977"),
            "lenet5": ("trainer.max_epochs=40", "targets.sparsity=0.9957", "callbacks.sharing.rate=0.0"),
        },
    ),
}


def run(claim: Claim, model: str, seed: int, *, data: Path, folder: Path) -> None:
    """Run the recipe from the command line, or go on with it."""
    run_recipe(
        folder,
        [
            f"recipe={claim.recipe}",
            f"model={model}",
            "data=mnist",
            f"data.path={data}",
            f"seed={seed}",
            *claim.overrides[model],
        ],
    )


def layers(contents: Inspection) -> list[dict[str, str]]:
    """Return the paper's table of one file: weights, how many are kept, bits of each kept one, and bytes."""
    rows = []
    for tensor in contents.tensors:
        if len(tensor.shape) < 2:
            continue
        size = tensor.size_bytes * 8 / tensor.bits_per_weight
        kept = size - tensor.zeros
        rows.append(
            {
                "layer": tensor.name.removesuffix(".weight"),
                "weights": f"{size:,.0f}",
                "kept": f"{kept / size:.1%}",
                "values": str(tensor.distinct - (tensor.zeros > 0)),
                "bits of a kept weight, place and value": f"{8 * tensor.size_bytes / kept:.2f}",
                "bytes": f"{tensor.size_bytes:,}",
                "of fp32": f"{tensor.size_bytes / size / 4:.2%}",
            }
        )
    return rows


def error(row: dict[str, Any]) -> float:
    """Return the test error in %."""
    return float(row["error"]["error_percent"])


def main() -> None:
    """Run what is missing, then write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="MNIST as an .npz, or the folder of its original files"
    )
    parser.add_argument("--claim", choices=CLAIMS, default="deep_compression")
    parser.add_argument("--only", choices=NAMES, help="this network, in a section of its own")
    parser.add_argument("--folder", type=Path, help="default: outputs/benchmarks/CLAIM_mnist")
    arguments = parser.parse_args()
    claim = CLAIMS[arguments.claim]
    folder = (arguments.folder or Path(f"outputs/benchmarks/{arguments.claim}_mnist")).resolve()
    for model in NAMES:
        for seed in SEEDS:
            if arguments.only in (None, model):
                run(claim, model, seed, data=arguments.data.resolve(), folder=folder / f"{model}_{seed}")
    report(arguments.claim, folder, only=arguments.only)


def report(name: str, folder: Path, *, only: str | None = None) -> None:
    """Write every seed's file and error, the bars, and the layers of the first seed's files."""
    rows, parts, claim = [], [], CLAIMS[name]
    for model, bar in claim.bars.items():
        title = NAMES[model]
        if only not in (None, model):
            continue
        reports = [json.loads((folder / f"{model}_{seed}" / "report.json").read_text()) for seed in SEEDS]
        packed = [next(row for row in found["artifacts"] if row["name"] == "edge") for found in reports]
        for seed, found, row in zip(SEEDS, reports, packed, strict=True):
            rows.append(
                {
                    "network": title,
                    "seed": str(seed),
                    "dense, error %": f"{error(found['baseline']):.2f}",
                    "model.edge, error %": f"{error(row):.2f}",
                    "bytes": f"{row['size_bytes']:,}",
                    "times smaller": f"{row['ratio']:.1f}",
                    claim.others: bar.other,
                }
            )
        largest, mean = max(row["size_bytes"] for row in packed), fmean(error(row) for row in packed)
        parts.append(
            f"{title}: the largest file has {largest:,} bytes (bar {bar.largest_bytes:,}), the mean error is"
            f" {mean:.2f} % (bar {bar.error_percent:.2f} %). Layers, seed 0:\n\n"
            + markdown(layers(inspect(folder / f"{model}_0" / "model.edge")))
        )
    body = f"{markdown(rows)}\n\n" + "\n\n".join(parts)
    option = "" if name == "deep_compression" else f" --claim {name}"
    title = claim.title
    if only is not None:
        option, title = f"{option} --only {only}", f"{title}, {NAMES[only]}"
    write_section(title, command=f"python benchmarks/deep_compression_mnist.py --data mnist.npz{option}", body=body)


if __name__ == "__main__":
    main()
