"""What the dense self is worth as a teacher: ResNet-20 on CIFAR-10, pruned to 80 % and shared to 4 bits, 5 epochs each.

The published weights have seen all 50,000 training images; nothing is chosen here, and all 10,000 test images are read.

Run: python benchmarks/self_distillation.py --data cifar10.npz --weights resnet20-12fca82f.th
A run that is cut goes on where it was; a row is written as soon as its runs are done.
"""

from dataclasses import dataclass
from pathlib import Path

from cifar10 import accuracy_percent, images
from runs import folder_of, parser_of, publish, run_recipe

SEEDS, EPOCHS = (0, 1), 5
COMMON = ("model=resnet20", "data=cifar10", "data.validation_from=test", "trainer.precision=bf16-mixed")


@dataclass(frozen=True)
class Technique:
    """One way to compress: its row's title and the command line's overrides."""

    title: str
    overrides: tuple[str, ...]


TECHNIQUES = {
    "pruned": Technique(
        "80 % pruned",
        (
            "recipe=prune_weights",
            "callbacks.pruning.sparsity=0.8",
            "callbacks.pruning.end_epoch=null",
            "callbacks.pruning.end_step=500",
            "callbacks.pruning.every=50",
        ),
    ),
    "shared": Technique(
        "shared, 4 bits",
        (
            "recipe=share_weights",
            "callbacks.sharing.clusters=null",
            "callbacks.sharing.bits=4",
            "callbacks.sharing.rate=0.0",
            "callbacks.sharing.channel_scale=false",
            "callbacks.sharing.reassign_every=null",
            "callbacks.sharing.freeze_epoch=null",
        ),
    ),
}
TEACHERS = {"alone": (), "taught": ("distillation=self",)}


def main() -> None:
    """Run what is missing; write each row as soon as it is there."""
    parser = parser_of(__doc__, folder="outputs/benchmarks/self_distillation", weights="ResNet-20")
    arguments = parser.parse_args()
    folder, trial = folder_of(arguments), arguments.trial
    paths = (f"data.path={arguments.data.resolve()}", f"baseline={arguments.weights.resolve()}")
    data, rows = images(arguments.data), []
    for seed in SEEDS:
        for name, technique in TECHNIQUES.items():
            accuracy = {}
            for teacher, more in TEACHERS.items():
                where: Path = folder / f"{name}_{teacher}_{seed}"
                settings = (f"seed={seed}", f"trainer.max_epochs={EPOCHS}")
                run_recipe(where, [*technique.overrides, *COMMON, *more, *paths, *settings], trial=trial)
                accuracy[teacher] = accuracy_percent(where / "model.onnx", data)[2]
            rows.append(
                {
                    "ResNet-20": technique.title,
                    "seed": str(seed),
                    "by the labels, %": f"{accuracy['alone']:.2f}",
                    "with its dense self, %": f"{accuracy['taught']:.2f}",
                    "gain, points": f"{accuracy['taught'] - accuracy['alone']:+.2f}",
                }
            )
            publish(
                "ResNet-20, CIFAR-10, with its dense self as teacher",
                rows,
                command="python benchmarks/self_distillation.py --data cifar10.npz --weights resnet20-12fca82f.th",
                text=f"{EPOCHS} epochs each, batch 128, bf16 autocast, from the published weights; soft targets at"
                " temperature 4 with weight 0.9, 0.1 for the labels. Sharing: 16 values a layer by k-means before the"
                " first epoch, fine-tuned; no scales. model.onnx in onnxruntime, all 10,000 test images.",
                trial=trial,
            )


if __name__ == "__main__":
    main()
