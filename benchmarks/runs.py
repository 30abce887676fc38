"""Recipes run from the command line: a run that is cut goes on where it was, a finished one is not repeated."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import markdown, write_section

TRIAL = (
    "trainer.max_epochs=4",
    "dense.trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "callbacks.export.min_agreement=0",
)
"""Overrides of a run that only shows that it runs."""


def command_line(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the arguments that begin a run in a folder, or go on with it, whichever stage it was cut in."""
    if (folder / ".hydra" / "config.yaml").is_file():  # written before anything is trained
        return [f"resume={folder}"]
    return [*overrides, "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"]


def run_recipe(folder: Path, overrides: Sequence[str], *, trial: bool = False) -> dict[str, Any]:
    """Run a recipe, or what is left of it, and return its report.

    Args:
        folder: Of this run alone; absolute.
        overrides: The command line, ``recipe=NAME`` among them.
        trial: Only show that it runs.
    """
    report = folder / "report.json"
    if not report.exists():
        arguments = command_line(folder, [*overrides, *(TRIAL if trial else ())])
        print(*arguments, flush=True)
        subprocess.run([sys.executable, "-m", "lightning_edge", *arguments], check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def parser_of(script: str, *, folder: str, weights: str) -> argparse.ArgumentParser:
    """Return a parser of what the scripts have in common.

    Args:
        script: The script's docstring.
        folder: Default place of its runs.
        weights: Which pretrained network it needs.
    """
    parser = argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as an .npz, or its original folder")
    parser.add_argument("--weights", type=Path, required=True, help=f"pretrained {weights}")
    parser.add_argument("--folder", type=Path, help=f"of the runs; default: {folder}")
    parser.add_argument("--trial", action="store_true", help="a few steps of each run; print, and write no results")
    parser.set_defaults(default_folder=Path(folder))
    return parser


def folder_of(arguments: argparse.Namespace) -> Path:
    """Return the folder of the runs, another one for a trial."""
    given: Path = arguments.folder or arguments.default_folder.with_name(
        arguments.default_folder.name + "_trial" * arguments.trial
    )
    return given.resolve()


def publish(
    title: str, rows: Sequence[dict[str, str]], *, command: str, text: str, after: str = "", trial: bool = False
) -> None:
    """Write the rows that there are by now into RESULTS.md; print them in a trial."""
    body = f"{text}\n\n{markdown(rows)}" + (f"\n\n{after}" if after else "")
    if trial:
        print(body, flush=True)
    else:
        write_section(title, command=command, body=body)
