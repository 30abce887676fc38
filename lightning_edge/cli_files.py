"""The commands on files: pack, unpack, inspect and run."""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_edge.artifact import InputInfo

FILE_USAGE = """\
lightning-edge pack SOURCE OUT [--no-adaptive]  pack an .onnx, .safetensors or saved state dict into a .edge file
lightning-edge unpack FILE OUT                  write its ordinary .onnx or .safetensors
lightning-edge inspect FILE                     print what is in a .edge file, tensor by tensor, and where its bytes go
lightning-edge run FILE [INPUT.npy ...]         run a .edge, .onnx or .pte file, print its outputs and its latency
                   [--out OUT.npy|.npz] [--threads N] [--repeat N]
unpack, inspect and run take --max-bytes N: refuse a .edge file that expands to more
"""
_CALLS, _SECONDS = 100, 10.0
"""How often `run` calls a file that nobody said it of, and how long that may take."""
_A_DAY = 86_400.0
_RANDOM = (
    *("bool", "float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
"""Types of inputs that random numbers can be made for."""


def file_command(arguments: Sequence[str]) -> int:
    """Run one command on files, and return 0.

    Raises:
        SystemExit: If the command line is wrong, of argparse.
        ValueError: If a file is damaged, or does not fit.
        FileNotFoundError: If there is no such file.
    """
    from lightning_edge.artifact.format import MAX_BYTES

    parser = argparse.ArgumentParser(prog="lightning-edge", usage=FILE_USAGE)
    commands = parser.add_subparsers(dest="command", required=True)
    added = {name: commands.add_parser(name, prog=f"lightning-edge {name}") for name in FILE_COMMANDS}
    added["pack"].add_argument("source", type=Path, help="what to pack")
    added["pack"].add_argument("--no-adaptive", action="store_true", help="leave out what is slower to read in numpy")
    for name in ("unpack", "inspect", "run"):
        added[name].add_argument("file", type=Path)
        added[name].add_argument(
            "--max-bytes", type=int, default=MAX_BYTES, help="most that a .edge file may expand to (%(default)s)"
        )
    for name in ("pack", "unpack"):
        added[name].add_argument("out", type=Path, help="the file to write")
    added["run"].add_argument("inputs", type=Path, nargs="*", metavar="INPUT.npy", help="one for each input, in order")
    added["run"].add_argument("--out", type=Path, help=".npy for one output, .npz for several")
    added["run"].add_argument("--threads", type=int, default=1, help="of the runtime")
    added["run"].add_argument(
        "--repeat", type=int, help=f"calls to time (default: {_CALLS}, or as many as {_SECONDS} s)"
    )
    given = parser.parse_args(arguments)
    FILE_COMMANDS[given.command](given)
    return 0


def _pack(given: argparse.Namespace) -> None:
    from lightning_edge.artifact import pack

    report = pack(given.source, given.out, adaptive=not given.no_adaptive)
    size = _size_with_tensors_beside(given.source)
    codecs = Counter(row.codec for row in report.tensors)
    print(f"source: {given.source}, {size:,} bytes")
    print(f"file: {report.path}, {report.size_bytes:,} bytes, {size / report.size_bytes:.2f} times smaller")
    print(f"tensors: {len(report.tensors)}{': ' if codecs else ''}" + _counted(codecs))


def _counted(codecs: Counter[str]) -> str:
    return ", ".join(f"{count} {codec}" for codec, count in codecs.most_common())


def _size_with_tensors_beside(path: Path) -> int:
    """Return the bytes of a file, and of those beside it that hold an ONNX model's tensors."""
    if path.suffix != ".onnx":
        return path.stat().st_size
    import onnx

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    beside = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in beside)))


def _unpack(given: argparse.Namespace) -> None:
    from lightning_edge.artifact import unpack

    path = unpack(given.file, given.out, max_bytes=given.max_bytes)
    print(f"file: {path}, {path.stat().st_size:,} bytes")


def _inspect(given: argparse.Namespace) -> None:
    from lightning_edge import artifact

    print_contents(artifact.inspect(given.file, max_bytes=given.max_bytes))


def _run(given: argparse.Namespace) -> None:
    import numpy as np

    from lightning_edge.artifact import load_artifact
    from lightning_edge.export.timing import time_sessions

    if given.out is not None and given.out.suffix not in (".npy", ".npz"):
        raise ValueError(f"out must end in .npy or .npz, got {given.out.name!r}")
    if given.repeat is not None and given.repeat < 1:
        raise ValueError(f"repeat must be at least 1, got {given.repeat}")
    session = load_artifact(given.file, threads=given.threads, max_bytes=given.max_bytes)
    rng = np.random.default_rng(0)
    arrays = [_read_array(path) for path in given.inputs] or [_random(item, rng) for item in session.inputs]
    try:
        found = session(*arrays)
    except ValueError:
        raise
    except Exception as error:  # a runtime's exceptions have no common class
        raise ValueError(f"{session.runtime} must be able to run {given.file} on these arrays, got: {error}") from error
    outputs = found if isinstance(found, tuple) else (found,)
    if given.out is not None:
        _write_arrays(given.out, outputs)
    calls = _CALLS if given.repeat is None else given.repeat
    seconds = _SECONDS if given.repeat is None else _A_DAY
    timed = time_sessions({"file": session}, arrays, warmup=1, blocks=1, calls_per_block=calls, seconds=seconds)["file"]
    print(f"file: {given.file}, {given.file.stat().st_size:,} bytes, {session.runtime}, threads {session.threads}")
    for item, array, path in zip(session.inputs, arrays, given.inputs or ["random numbers"] * len(arrays), strict=True):
        print(f"input {item.name}: {_described(array)}, {path}")
    for number, array in enumerate(outputs):
        print(f"output {number}: {_described(array)}" + ("" if given.out is None else f", written to {given.out}"))
    print(f"latency: median {timed.p50_ms:.3f} ms, 95th percentile {timed.p95_ms:.3f} ms, {timed.calls} calls")


def _read_array(path: Path) -> "NDArray[Any]":
    import numpy as np

    try:
        array: object = np.load(path, allow_pickle=False)
    except Exception as error:  # of numpy and zipfile: an empty file, another format, no file
        raise ValueError(f"inputs must be .npy files, got {str(path)!r}, which cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"inputs must be .npy files of one array each, got {str(path)!r}, which holds several")
    return array


def _random(item: "InputInfo", rng: "np.random.Generator") -> "NDArray[Any]":
    """Return an array for an input, 1 for every free dimension: normal numbers, any bytes, small whole numbers."""
    import numpy as np

    if item.dtype not in _RANDOM:
        raise ValueError(f"inputs must be given for {item.name!r}: there are no random numbers of type {item.dtype}")
    shape, dtype = tuple(size or 1 for size in item.shape), np.dtype(item.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    # Wider integers are often places in a table, which has at least two rows.
    bounds = np.iinfo(dtype) if dtype.kind in "iu" and dtype.itemsize == 1 else None
    low, high = (bounds.min, bounds.max) if bounds is not None else (0, 1)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


def _write_arrays(path: Path, arrays: "Sequence[NDArray[Any]]") -> None:
    import numpy as np

    from lightning_edge.artifact.reading import write_atomically

    data = io.BytesIO()
    if path.suffix == ".npz":
        named: dict[str, Any] = {f"output{number}": array for number, array in enumerate(arrays)}
        np.savez(data, **named)
    elif len(arrays) == 1:
        np.save(data, arrays[0], allow_pickle=False)
    else:
        raise ValueError(f"out must end in .npz for {len(arrays)} outputs, got {path.name!r}")
    write_atomically(path, data.getvalue())


def _described(array: "NDArray[Any]") -> str:
    return f"{array.dtype} {' x '.join(map(str, array.shape)) or 'scalar'}"


FILE_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pack": _pack,
    "unpack": _unpack,
    "inspect": _inspect,
    "run": _run,
}


def print_contents(contents: Any) -> None:
    """Print a frozen dataclass: its sequences of dataclasses as tables, the rest one line each."""
    # Rich takes a pipe for 80 columns wide, and would fold the names of the tensors.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    values = {field.name: getattr(contents, field.name) for field in fields(contents)}
    tables = {name: rows for name, rows in values.items() if isinstance(rows, tuple | list)}
    for name, value in values.items():
        if name not in tables:
            console.print(f"{name.replace('_', ' ')}: {_cell(value)}", markup=False)
    for name, rows in tables.items():
        if not _are_rows(rows):
            console.print(f"{name.replace('_', ' ')}: {_cell(rows) or 'none'}", markup=False)
            continue
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
        for field in fields(rows[0]):
            is_number = isinstance(getattr(rows[0], field.name), int | float)
            title = field.name.replace("_", " ")
            table.add_column(title, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
        for row in rows:
            table.add_row(*(escape(_cell(getattr(row, field.name))) for field in fields(row)))
        console.print(table)


def _are_rows(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(is_dataclass(value) for value in values)


def _cell(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
