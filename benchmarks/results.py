"""Write one section of RESULTS.md: what was measured, by which command, on what."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results\n\nEach section is written by the script that its command names; run the command to repeat it.\n"


def machine() -> str:
    """Return the processor, its cores, and the versions that decide about speed."""
    model = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    name = model.group(1) if model else platform.processor()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the rows as a Markdown table, columns in the order of the first row."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(title: str, *, command: str, body: str) -> None:
    """Replace the section of that title in RESULTS.md, or add it; written to a temporary name and renamed."""
    text = RESULTS.read_text() if RESULTS.exists() else TITLE
    section = f"## {title}\n\n`{command}`\n\n{machine()}\n\n{body}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text}\n{section}"
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text.rstrip() + "\n")
    temporary.replace(RESULTS)
    print(section)
