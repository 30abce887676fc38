"""What a fake-quantized training step of ResNet-20 costs, against fp32, plain PT2E and NNCF, batch 128.

Every process takes steps in blocks that take turns, one thread pool of the size given; the cost is the median over the
blocks of the ratio to fp32 in the same round, with its 95 % interval. NNCF needs other versions of its dependencies: it
runs in a Python of its own, which only has to have torch and nncf, and measures fp32 itself beside it. The step before
``start_epoch`` is that of a module with the callback attached and nothing captured.

Run: python benchmarks/quantized_step_cost.py [--nncf-python PYTHON]
"""

import argparse
import copy
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS, STEPS = 20, 3
SHAPE = (128, 3, 32, 32)
Step = Callable[[], float]


def batch() -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randint(10, SHAPE[:1], generator=generator)


def step_of(network: nn.Module) -> Step:
    """Return what takes a training step and says how many seconds it took."""
    images, labels = batch()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def take_turns(steps: Mapping[str, Step]) -> dict[str, list[float]]:
    """Return the median seconds of a step in each block; every second round goes backwards."""
    for step in steps.values():
        step()
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for block in range(BLOCKS):
        for name in list(steps)[:: 1 if block % 2 else -1]:
            taken[name].append(statistics.median(steps[name]() for _ in range(STEPS)))
    return taken


def waiting(network: nn.Module) -> Step:
    """Return the step of a network whose quantization has not begun."""
    import lightning as L

    from lightning_edge import QuantizationAwareTraining

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = QuantizationAwareTraining(start_epoch=1)
    trainer = L.Trainer(
        max_epochs=2, max_steps=1, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet
    )
    with suppress(ValueError):  # that the fit ended before quantization began is what is wanted here
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), SHAPE[0]))
    return step_of(network.train())


def plain_pt2e(network: nn.Module) -> Step:
    """Return the step of torchao's own graph for training."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    sizes = ({0: torch.export.Dim("batch", min=1)},)
    graph = torch.export.export(network, (batch()[0],), dynamic_shapes=sizes).module()
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    prepared = prepare_qat_pt2e(graph, XNNPACKQuantizer().set_global(config))
    return step_of(move_exported_model_to_train(prepared))


def ours() -> dict[str, list[float]]:
    """Measure all but NNCF."""
    from lightning_edge.models import ResNet20
    from lightning_edge.surgery.quantization import capture_

    torch.manual_seed(0)
    networks = {name: copy.deepcopy(ResNet20()) for name in ("fp32", "before", "ours", "pt2e")}
    capture_(networks["ours"], (batch()[0],))
    steps = {
        "fp32": step_of(networks["fp32"]),
        "before start_epoch": waiting(networks["before"]),
        "fake-quantized": step_of(networks["ours"].train()),
        "plain PT2E": plain_pt2e(networks["pt2e"]),
    }
    return take_turns(steps)


def of_nncf(network_file: Path) -> dict[str, list[float]]:
    """Measure NNCF and fp32 beside it; the network comes from a file, since this Python has no lightning_edge."""
    import importlib.util

    import nncf

    spec = importlib.util.spec_from_file_location("resnet", network_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    dense = module.ResNet20()
    quantized = nncf.quantize(copy.deepcopy(dense).eval(), nncf.Dataset([batch()[0]]), subset_size=1)
    return take_turns({"fp32": step_of(dense.train()), "NNCF": step_of(quantized.train())})


def rows_of(taken: Mapping[str, list[float]]) -> list[dict[str, str]]:
    """Return the lines of the table."""
    from lightning_edge.export.timing import Latency, ratio

    timed = {
        name: Latency(0.0, 0.0, BLOCKS * STEPS, torch.get_num_threads(), "torch", tuple(blocks))
        for name, blocks in taken.items()
    }
    rows = []
    for name, blocks in taken.items():
        cost = ratio(timed["fp32"], timed[name])
        step = f"{1000 * statistics.median(blocks):.0f}"
        rows.append({"step": name, "ms": step, "/ fp32": f"{cost.median:.3f} ({cost.low:.3f} to {cost.high:.3f})"})
    return rows


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncf-python", help="a Python with torch and nncf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-nncf", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_nncf is not None:
        print(json.dumps(of_nncf(arguments.measure_nncf)))
        return
    from results import markdown, write_section

    import lightning_edge.models.resnet as resnet

    rows = rows_of(ours())
    if arguments.nncf_python:
        options = ["--threads", str(arguments.threads), "--measure-nncf", str(resnet.__file__)]
        done = subprocess.run(
            [arguments.nncf_python, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
        )
        theirs = rows_of(json.loads(done.stdout.splitlines()[-1]))
        rows += [{**row, "step": row["step"].replace("fp32", "fp32, in NNCF's Python")} for row in theirs]
    body = (
        f"Batch {SHAPE[0]}, {arguments.threads} threads, {BLOCKS} blocks of {STEPS} steps that take turns; medians over"
        f" the blocks, with their 95 % interval.\n\n{markdown(rows)}"
    )
    command = "python benchmarks/quantized_step_cost.py --nncf-python PYTHON"
    write_section("ResNet-20, cost of a fake-quantized step", command=command, body=body)


if __name__ == "__main__":
    main()
