"""Deep Compression's own table (Han et al. 2016, tables 1 to 3): both LeNets on MNIST, by one recipe each.

Seeds 0, 1 and 2, and no others; whole files counted; 5,000 training images are kept back for validation, on which
settings were chosen; the test images are read once, by the file itself, at the end of each run. A run that is cut goes
on where it was. `--recipe edge_tiny` goes beyond the paper: the dense network teaches the compressed one.

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
PAPER = {"lenet300": ("LeNet-300-100", 27_000, 1.58), "lenet5": ("LeNet-5", 44_000, 0.74)}
"""Name, bytes of the paper, and the paper's test error in %."""


@dataclass(frozen=True)
class Claim:
    """What a recipe has to reach: the largest file of each network, and what the command line adds for it."""

    title: str
    largest: Mapping[str, int]
    overrides: Mapping[str, tuple[str, ...]]


CLAIMS = {
    # 1/40 and 1/39 of the fp32 weights, as in the paper
    "deep_compression": Claim(
        "Deep Compression on MNIST",
        {"lenet300": 26_661, "lenet5": 44_213},
        dict.fromkeys(("lenet300", "lenet5"), ("~distillation", "trainer.gradient_clip_val=null")),  # as the paper
    ),
    # 1/100 and 1/200
    "edge_tiny": Claim(
        "Beyond Deep Compression on MNIST",
        {"lenet300": 10_664, "lenet5": 8_621},
        {
            # a teacher of 2 x 1200 units; settings were chosen by seed 0's validation error
            "lenet300": (
                "trainer.max_epochs=60",
                "targets.sparsity=0.968",
                "callbacks.sharing.rate=0.0",
                "distillation=larger",
                "+larger.trainer.max_epochs=20",
            ),
            "lenet5": ("trainer.max_epochs=40", "targets.sparsity=0.985", "callbacks.sharing.rate=0.0"),
        },
    ),
}


def run(recipe: str, model: str, seed: int, *, data: Path, folder: Path) -> None:
    """Run the recipe from the command line, or go on with it."""
    run_recipe(
        folder,
        [
            f"recipe={recipe}",
            f"model={model}",
            "data=mnist",
            f"data.path={data}",
            f"seed={seed}",
            *CLAIMS[recipe].overrides.get(model, ()),
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
    parser.add_argument("--recipe", choices=CLAIMS, default="deep_compression")
    parser.add_argument("--only", choices=PAPER, help="this network, in a section of its own")
    parser.add_argument("--folder", type=Path, help="default: outputs/benchmarks/RECIPE_mnist")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(f"outputs/benchmarks/{arguments.recipe}_mnist")).resolve()
    for model in PAPER:
        for seed in SEEDS:
            if arguments.only in (None, model):
                run(arguments.recipe, model, seed, data=arguments.data.resolve(), folder=folder / f"{model}_{seed}")
    report(arguments.recipe, folder, only=arguments.only)


def report(recipe: str, folder: Path, *, only: str | None = None) -> None:
    """Write every seed's file and error, the bars, and the layers of the first seed's files."""
    rows, parts, claim = [], [], CLAIMS[recipe]
    for model, (title, paper_bytes, bar_error) in PAPER.items():
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
                    "the paper": f"{bar_error:.2f} %, {paper_bytes // 1000} KB",
                }
            )
        largest, mean = max(row["size_bytes"] for row in packed), fmean(error(row) for row in packed)
        parts.append(
            f"{title}: the largest file has {largest:,} bytes (bar {claim.largest[model]:,}), the mean error is"
            f" {mean:.2f} % (bar {bar_error:.2f} %). Layers, seed 0:\n\n"
            + markdown(layers(inspect(folder / f"{model}_0" / "model.edge")))
        )
    body = f"{markdown(rows)}\n\n" + "\n\n".join(parts)
    option = "" if recipe == "deep_compression" else f" --recipe {recipe}"
    title = claim.title
    if only is not None:
        option, title = f"{option} --only {only}", f"{title}, {PAPER[only][0]}"
    write_section(title, command=f"python benchmarks/deep_compression_mnist.py --data mnist.npz{option}", body=body)


if __name__ == "__main__":
    main()
