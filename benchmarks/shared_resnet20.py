"""ResNet-20 on CIFAR-10 from pretrained weights, in fewer and fewer bytes: rate-aware sharing, alone and fine-tuned.

Whole `.edge` files without their graph section, beside what nncodec (ISO/IEC 15938-17) makes of the same network
without retraining, whole state dict, batch norms folded. The published weights have seen all 50,000 training images, so
settings were chosen on the test images 0 to 4,999 ("validation").

Run: python benchmarks/shared_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th
A run that is cut goes on where it was; finished ones are not repeated. Fine-tuning is by the labels and by the dense
network's own outputs. `--norms` compares, without training, batch norms that are folded before the weights are shared.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from results import markdown, write_section
from runs import run_recipe
from torch import Tensor, nn

from lightning_edge import export, load_artifact, share_weights_
from lightning_edge.artifact import inspect
from lightning_edge.data import CIFAR10DataModule
from lightning_edge.models import ResNet20
from lightning_edge.surgery.batchnorm_folding import fold_batch_norms_

ALONE = (0.01, 0.02, 0.03, 0.04, 0.055)
TUNED = (0.005, 0.01, 0.02, 0.04, 0.055, 0.1, 0.12)
EPOCHS, CLUSTERS = 3, 64
EXAMPLE = (torch.zeros(2, 3, 32, 32),)
NORMS = {"apart": (False, False), "apart, a scale per channel": (False, True), "folded": (True, False)}
"""Whether norms are folded first, and whether channels have scales."""
PEER = (
    (152_477, 91.65),
    (121_466, 91.38),
    (104_449, 90.72),
    (98_072, 91.10),
    (92_708, 90.21),
    (83_529, 89.85),
    (76_458, 88.71),
    (65_590, 88.19),
)
"""Bytes and accuracy of nncodec on the same weights, in percent of the 10,000 test images."""


def pretrained(weights: Path) -> nn.Module:
    """Return the published network."""
    network = ResNet20()
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.eval()


def share_alone(rate: float, *, weights: Path, folder: Path, norms: str = "apart, a scale per channel") -> Path:
    """Return the file of the network shared at this rate, without training."""
    folded, channel_scale = NORMS[norms]
    path = folder / f"alone{'_folded' * folded}{'_one_scale' * (not channel_scale)}_{rate:g}.edge"
    if not path.exists():
        network = pretrained(weights)
        if folded:
            fold_batch_norms_(network, example_inputs=EXAMPLE)
        share_weights_(network, clusters=CLUSTERS, channel_scale=channel_scale, rate=rate)
        export(network, path, example_inputs=EXAMPLE)
    return path


def tune(rate: float, *, data: Path, weights: Path, folder: Path) -> Path:
    """Return the file of the network shared at this rate and fine-tuned from the command line; goes on where it was."""
    path = folder / f"tuned_{rate:g}"
    overrides = [
        "recipe=share_weights",
        "model=resnet20",
        "data=cifar10",
        "data.validation_from=test",
        f"data.path={data}",
        f"baseline={weights}",
        "distillation=self",
        f"callbacks.sharing.rate={rate}",
        f"trainer.max_epochs={EPOCHS}",
        "trainer.precision=bf16-mixed",
    ]
    run_recipe(path, overrides)
    return path / "model.edge"


def accuracy(path: Path, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the percentage of images that the file labels right."""
    session = load_artifact(path, threads=2)
    right = [torch.from_numpy(session(images.numpy())).argmax(1) == labels for images, labels in loader]
    return 100 * float(torch.cat(right).float().mean())


def compare_norms(data: CIFAR10DataModule, *, weights: Path, folder: Path) -> None:
    """Write the section on folding, measured on the validation images."""
    rows = []
    for rate in ALONE:
        cells = {"rate": f"{rate:g}"}
        for norms in NORMS:
            path = share_alone(rate, weights=weights, folder=folder, norms=norms)
            contents = inspect(path)
            size = contents.size_bytes - contents.graph_bytes
            cells[f"{norms}: bytes, validation %"] = f"{size:,}, {accuracy(path, data.val_dataloader()):.2f}"
        rows.append(cells)
    body = (
        "Norms beside the layers, or folded by `fold_batch_norms_` before weights are shared; at most"
        f" {CLUSTERS} values per layer, no training; bytes without the graph section; test images 0 to"
        f" 4,999.\n\n{markdown(rows)}"
    )
    command = "python benchmarks/shared_resnet20.py --norms --data cifar10.npz --weights resnet20-12fca82f.th"
    write_section("ResNet-20, shared, batch norms folded or apart", command=command, body=body)


def row(title: str, rate: float, path: Path, data: CIFAR10DataModule) -> dict[str, str]:
    """Return one row of the table: bytes without the graph, and accuracies of the file."""
    parts = [accuracy(path, loader) for loader in (data.val_dataloader(), data.test_dataloader())]
    contents = inspect(path)
    size = contents.size_bytes - contents.graph_bytes
    below = [accuracy for peer_size, accuracy in PEER if peer_size >= size]
    return {
        "sharing": title,
        "rate": f"{rate:g}",
        "bytes without the graph": f"{size:,}",
        "whole file": f"{contents.size_bytes:,}",
        "all 10,000, %": f"{sum(parts) / 2:.2f}",
        "images 5,000 to 9,999, %": f"{parts[1]:.2f}",
        "validation, %": f"{parts[0]:.2f}",
        "nncodec at the next larger size, %": f"{below[-1]:.2f}" if below else "",
    }


def main() -> None:
    """Run what is missing, then write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz, or its original folder")
    parser.add_argument("--weights", type=Path, required=True, help="pretrained ResNet-20")
    parser.add_argument("--only", nargs="*", type=float, help="fine-tune at these rates, and stop")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/shared_resnet20"))
    parser.add_argument("--norms", action="store_true", help="compare folded batch norms, and stop")
    arguments = parser.parse_args()
    folder, weights, data = arguments.folder.resolve(), arguments.weights.resolve(), arguments.data.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = CIFAR10DataModule(path=data, validation_from="test", batch_size=500)
    images.setup()
    if arguments.norms:
        compare_norms(images, weights=weights, folder=folder)
        return
    tuned = {
        rate: tune(rate, data=data, weights=weights, folder=folder)
        for rate in (arguments.only if arguments.only is not None else TUNED)
    }
    if arguments.only is not None:
        return
    dense = export(pretrained(weights), folder / "dense.edge", example_inputs=EXAMPLE)
    rows = [row("none (dense)", 0.0, dense, images)]
    rows += [row("alone", rate, share_alone(rate, weights=weights, folder=folder), images) for rate in ALONE]
    rows += [row(f"{EPOCHS} epochs", rate, path, images) for rate, path in tuned.items()]
    peers = [{"bytes": f"{size:,}", "all 10,000, %": f"{accuracy:.2f}"} for size, accuracy in PEER]
    body = (
        f"At most {CLUSTERS} values per layer, a scale per output channel, zeros and codes by distortion + rate x bits;"
        f" model.edge in onnxruntime.\n\n{markdown(rows)}\n\nnncodec, without retraining:\n\n{markdown(peers)}"
    )
    command = "python benchmarks/shared_resnet20.py --data cifar10.npz --weights resnet20-12fca82f.th"
    write_section("ResNet-20, CIFAR-10, shared", command=command, body=body)


if __name__ == "__main__":
    main()
