"""What a teacher gave, kept on disk: a row that comes again is not computed again."""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from lightning_edge.surgery.distillation import Call

_KEY_BYTES = 16
_SHARD_ROWS = 4096

_NOISE = 0.02  # what bfloat16 may make of another order of sums, of the norm

Row = tuple[Tensor, ...]
Teach = Callable[[tuple[Any, ...], dict[str, Any]], Call]


class TeacherCache:
    """Rows of a teacher's output and features, by the bytes of the input rows that they were computed of.

    A row is what belongs to one index of the first dimension. Rows are written in shards, each under its final name
    only when it is whole, and are mapped into memory when they are read; a run that was killed goes on with all shards
    that it finds, but for those that cannot be read. Ranks write shards of their own, and read those of the others
    after each epoch. Where data are augmented at random no row comes again: after the first epoch without a hit the
    cache says so, and gives up.

    Args:
        folder: Of this teacher alone, see :func:`teacher_key`; created when the first shard is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[bytes, Row] = {}
        self._new: dict[bytes, Row] = {}
        self._spec: TreeSpec | None = None
        self._read: set[str] = set()
        self._asked = self._hits = self._known_before = 0
        self._useless = self._tried = False
        self._load(self._shards())

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], teach: Teach) -> Call:
        """Return what the teacher gives: from the cache the rows that it has, the others computed.

        Args:
            args: Inputs of the teacher; the first tensor says how many rows there are.
            kwargs: Further inputs.
            teach: Computes all rows of some inputs; called if one is missing.

        Raises:
            ValueError: If the teacher does not give one row for each row of the inputs, whatever the others are.
        """
        if self._useless:
            return teach(args, kwargs)
        keys = row_keys(args, kwargs)
        missing = [key for key in keys if key not in self._rows]
        self._asked += len(keys)
        self._hits += len(keys) - len(missing)
        if missing:
            taught = teach(args, kwargs)
            self._add(keys, taught)
            self._try_once(args, kwargs, taught, teach)
        assert self._spec is not None
        device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        leaves = [torch.stack(parts).to(device) for parts in zip(*(self._rows[key] for key in keys), strict=True)]
        output, features = tree_unflatten(leaves, self._spec)
        return Call(args, kwargs, output, features)

    def flush(self) -> None:
        """Write the rows that are new, one shard for all of one shape."""
        by_shape: dict[tuple[torch.Size, ...], list[bytes]] = {}
        for key, row in self._new.items():
            by_shape.setdefault(tuple(tensor.shape for tensor in row), []).append(key)
        for keys in by_shape.values():
            columns = zip(*(self._new[key] for key in keys), strict=True)
            path = self._write(keys, [torch.stack(column) for column in columns])
            for key in keys:
                del self._rows[key]  # from here on it is read from the file
            self._load([path])
        self._new = {}

    def close_epoch(self) -> None:
        """Read what other ranks have written; give up a cache that held rows at the epoch's start, and gave none."""
        self._load(self._shards())
        if self._known_before and self._asked and not self._hits and not self._useless:
            self._useless = True
            rank_zero_warn(
                f"cache={str(self.folder.parent)!r} gave none of its {self._known_before} rows in this epoch, and is"
                " not used any more: rows come again only where training data are not augmented at random"
            )
        self._asked, self._hits, self._known_before = 0, 0, len(self._rows)

    def _add(self, keys: Sequence[bytes], taught: Call) -> None:
        leaves, spec = tree_flatten((taught.output, taught.features))
        if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(keys) for leaf in leaves):
            shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
            raise ValueError(
                "cache must be None for a teacher that does not give tensors with one row for each of the"
                f" {len(keys)} rows of its inputs, got {shapes}"
            )
        try:
            treespec_dumps(spec)
        except NotImplementedError as error:
            raise ValueError(
                f"cache must be None for a teacher that gives a {type(taught.output).__name__}, which has no name in"
                " a file: return a tensor, a tuple or a dict"
            ) from error
        self._spec = spec
        stored = [leaf.detach().cpu() for leaf in leaves]
        for place, key in enumerate(keys):
            if key not in self._rows:
                self._rows[key] = self._new[key] = tuple(leaf[place].clone() for leaf in stored)
        if len(self._new) >= _SHARD_ROWS:
            self.flush()

    def _try_once(self, args: tuple[Any, ...], kwargs: dict[str, Any], taught: Call, teach: Teach) -> None:
        """Refuse a teacher whose rows depend on each other: in the reverse order it gives other ones."""
        rows = taught.rows
        if self._tried or rows < 2:
            return
        self._tried = True
        reversed_args, reversed_kwargs = tree_map_only(Tensor, partial(_reversed, rows=rows), (args, kwargs))
        again = teach(reversed_args, reversed_kwargs)
        pairs = zip(*(tree_leaves((call.output, call.features)) for call in (taught, again)), strict=True)
        for first, second in pairs:
            if first.shape != second.shape or not _alike(first.float(), second.flip(0).float()):
                self._rows, self._new = {}, {}
                raise ValueError(
                    "cache must be None for a teacher that gives other rows for the same inputs in another order: the"
                    " first dimension has to be the batch, and no row may depend on the others"
                )

    def _write(self, keys: Sequence[bytes], columns: Sequence[Tensor]) -> Path:
        assert self._spec is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        joined = b"".join(keys)
        # Named by what it holds: two runs, or two ranks, never write different shards under one name.
        path = self.folder / f"{hashlib.blake2b(joined, digest_size=_KEY_BYTES).hexdigest()}.pt"
        shard = {
            "keys": torch.frombuffer(bytearray(joined), dtype=torch.uint8).view(len(keys), _KEY_BYTES),
            "columns": list(columns),
            "spec": treespec_dumps(self._spec),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        torch.save(shard, temporary)
        temporary.replace(path)
        return path

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.pt") if path.name not in self._read)

    def _load(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._read.add(path.name)
            try:
                shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                self._spec = treespec_loads(shard["spec"])
            except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
                reason = " ".join(str(error).split())[:200]
                rank_zero_warn(
                    f"cache must hold whole files, got {path}, which cannot be read ({reason}): its rows are computed"
                    " again; delete it"
                )
                continue
            for place, key in enumerate(shard["keys"].numpy()):
                self._rows.setdefault(key.tobytes(), tuple(column[place] for column in shard["columns"]))


def teacher_key(network: nn.Module, layers: Sequence[str], *, precision: str | None) -> str:
    """Return a name for what a teacher computes: another one for other weights, layers looked at, or precision.

    Numbers and strings that modules keep as attributes count, and so do buffers that are in no ``state_dict``; the code
    of a ``forward`` is not looked at.

    >>> line = nn.Linear(2, 1)
    >>> teacher_key(line, [], precision=None) == teacher_key(line, [], precision="bf16")
    False
    """
    digest = hashlib.blake2b(repr((type(network).__qualname__, str(network), list(layers), precision)).encode())
    for name, module in network.named_modules():
        kept = {key: value for key, value in vars(module).items() if key[0] != "_" and key != "training"}
        plain = {key: value for key, value in kept.items() if isinstance(value, bool | int | float | str)}
        digest.update(repr((name, sorted(plain.items()))).encode())
    for name, value in {**network.state_dict(), **dict(network.named_buffers())}.items():
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(_bytes(value).numpy().tobytes())
    return digest.hexdigest()[: 2 * _KEY_BYTES]


def row_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes]:
    """Return a name for each row of a network's inputs, by their bytes; what has no rows is a part of every name.

    >>> first, second, third = row_keys((torch.tensor([[1.0], [2.0], [1.0]]),), {})
    >>> first == third, first == second
    (True, False)
    """
    leaves, spec = tree_flatten((args, kwargs))
    rows = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
    common = hashlib.blake2b(str(spec).encode(), digest_size=_KEY_BYTES)
    each = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            common.update(repr((leaf.dtype, tuple(leaf.shape[1:]))).encode())
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows:
            each.append(_bytes(leaf).view(rows, -1).numpy())
        else:
            common.update(_bytes(leaf).numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    digests = [common.copy() for _ in range(rows)]
    for place, digest in enumerate(digests):
        for part in each:
            digest.update(part[place].tobytes())
    return [digest.digest() for digest in digests]


def _reversed(value: Tensor, *, rows: int) -> Tensor:
    return value.flip(0) if value.ndim and len(value) == rows else value


def _alike(first: Tensor, second: Tensor) -> bool:
    """Return whether two results are equal but for the order of their sums."""
    return bool((first - second).norm() <= _NOISE * first.norm())


def _bytes(value: Tensor) -> Tensor:
    """Return the bytes of a tensor, flat."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8)
