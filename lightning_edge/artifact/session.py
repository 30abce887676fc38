"""Run a file: one signature for every format, arrays in, arrays out."""

import io
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_edge.artifact.format import MAX_BYTES
from lightning_edge.artifact.reading import onnx_bytes
from lightning_edge.functional.bytestream import EdgeFormatError

Array = NDArray[Any]
_MOST_SIZES = 4  # of inputs, for which OpenVINO compiles: int8 ResNet-20 takes 0.78 of the time with known sizes


@dataclass(frozen=True)
class InputInfo:
    """An input of a session; a dimension that is free is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class Session:
    """A loaded file. Call it with one array per input, in order or by name; it returns an array or a tuple of several.

    Attributes:
        path: The file.
        runtime: Name and version of what runs it.
        threads: Threads of the runtime for one call.
        inputs: What it takes.
        outputs: The names of what it returns, in order; of a network that returns a dict they are its keys.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Array]], Sequence[Array]],
        *,
        path: Path,
        runtime: str,
        threads: int,
        inputs: Sequence[InputInfo],
        outputs: Sequence[str],
    ) -> None:
        self._run = run
        self.path, self.runtime, self.threads = path, runtime, threads
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def __call__(self, *arrays: Array, **named: Array) -> Array | tuple[Array, ...]:
        """Return the outputs for one array per input.

        Raises:
            ValueError: If number, names, size or type of the arrays are not those of the inputs.
        """
        names = [item.name for item in self.inputs]
        if len(arrays) + len(named) != len(names) or set(named) != set(names[len(arrays) :]):
            got = f"{len(arrays)} and {sorted(named)}" if named else str(len(arrays))
            raise ValueError(f"{self.path.name} must get {len(names)} arrays, {names}, got {got}")
        arrays = (*arrays, *(named[name] for name in names[len(arrays) :]))
        for item, array in zip(self.inputs, arrays, strict=True):
            _check(self.path, item, np.asarray(array))
        outputs = self._run([np.asarray(array, order="C") for array in arrays])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def load_artifact(
    path: str | Path, *, threads: int = 1, runtime: str | None = None, max_bytes: int = MAX_BYTES
) -> Session:
    """Load a ``.edge``, ``.onnx`` or ``.pte`` file into the runtime that runs it.

    A ``.edge`` file is expanded in memory and runs in onnxruntime: numpy, onnxruntime and zstandard suffice for it.

    Args:
        path: The file; the suffix says which runtime.
        threads: Threads of the runtime for one call. ExecuTorch has one pool in a process: the last load counts.
        runtime: ``"openvino"`` for ``.onnx`` and ``.edge`` (needs the extra ``openvino``); None for the usual one.
        max_bytes: Most bytes that a ``.edge`` file may expand to, see
            :func:`~lightning_edge.artifact.reading.open_file`; the runtime takes a few times as many.

    Raises:
        ValueError: If the suffix or the runtime is unknown, ``threads`` is below 1, or the file is damaged
            (``EdgeFormatError``).
        FileNotFoundError: If there is no such file.
        ImportError: If the runtime is not installed; says how to install it.
    """
    path = Path(path)
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a whole number, at least 1, got {threads!r}")
    if runtime not in _RUNTIMES:
        raise ValueError(f"runtime must be one of {list(_RUNTIMES)}, got {runtime!r}")
    suffixes = [".edge", ".onnx", ".pte"] if runtime is None else [".edge", ".onnx"]
    if path.suffix not in suffixes:
        raise ValueError(f"path must end in one of {suffixes}, got {path.name!r}")
    if not path.is_file():
        raise FileNotFoundError(
            f"path must be a file, got {str(path)!r}, which does not exist (seen from {Path.cwd()})"
        )
    if path.suffix == ".pte":
        return _load_pte(path, threads)
    load = _RUNTIMES[runtime]
    if path.suffix == ".onnx":
        return load(str(path), path, threads)  # by its path: tensors may lie in files beside it
    model = onnx_bytes(path, max_bytes=max_bytes)
    try:
        return load(model, path, threads)
    except ValueError as error:
        raise EdgeFormatError(str(error), offset=0) from error


def _onnxruntime(model: bytes | str, path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise ValueError(f"onnxruntime must be able to load {path}, got: {error}") from error
    inputs = [
        InputInfo(
            item.name, tuple(size if isinstance(size, int) else None for size in item.shape), _numpy_name(item.type)
        )
        for item in session.get_inputs()
    ]
    names = [item.name for item in inputs]

    def run(arrays: Sequence[Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
        return outputs

    return Session(
        run,
        path=path,
        runtime=f"onnxruntime {onnxruntime.__version__}",
        threads=threads,
        inputs=inputs,
        outputs=[item.name for item in session.get_outputs()],
    )


def _openvino(model: bytes | str, path: Path, threads: int) -> Session:
    try:
        import openvino
    except ImportError as error:
        message = f"OpenVINO must be installed to run {path.name} in it: pip install 'lightning-edge[openvino]'"
        raise ImportError(message) from error
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = "f32"  # processors with bf16 would compute a float network in that
    try:
        network = core.read_model(io.BytesIO(model) if isinstance(model, bytes) else model)
        compiled = core.compile_model(network, "CPU", options)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO must be able to load {path}, got: {error}") from error
    inputs = [
        InputInfo(
            port.get_any_name(),
            tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
            np.dtype(port.element_type.to_dtype()).name,
        )
        for port in compiled.inputs
    ]
    known: dict[tuple[tuple[int, ...], ...], Any] = {}
    one_at_a_time = threading.Lock()  # a request has one place for its outputs
    any_size = compiled.create_infer_request()
    free = any(None in item.shape for item in inputs)

    def run(arrays: Sequence[Array]) -> Sequence[Array]:
        sizes = tuple(array.shape for array in arrays)
        with one_at_a_time:
            if free and sizes not in known and len(known) < _MOST_SIZES:
                sized = network.clone()
                sized.reshape(dict(enumerate(sizes)))
                known[sizes] = core.compile_model(sized, "CPU", options).create_infer_request()
            request = known.get(sizes, any_size)
            for index, array in enumerate(arrays):
                given = array if array.flags.writeable else array.copy()  # OpenVINO shares no memory that is read-only
                request.set_input_tensor(index, openvino.Tensor(given, shared_memory=True))
            request.infer()
            # A copy: the next call writes its outputs to the same memory.
            return [np.array(request.get_output_tensor(index).data) for index in range(len(compiled.outputs))]

    return Session(
        run,
        path=path,
        runtime=f"OpenVINO {openvino.__version__}",
        threads=threads,
        inputs=inputs,
        outputs=[port.get_any_name() for port in compiled.outputs],
    )


def _load_pte(path: Path, threads: int) -> Session:
    try:
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This API is experimental")
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime
    except ImportError as error:
        message = f"ExecuTorch must be installed to run {path.name}: pip install 'lightning-edge[executorch]'"
        raise ImportError(message) from error
    from importlib.metadata import version

    _unsafe_reset_threadpool(threads)
    try:
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")
    except RuntimeError as error:
        raise ValueError(f"ExecuTorch must be able to load {path}, got: {error}") from error
    metadata = method.metadata
    tensors = [metadata.input_tensor_meta(index) for index in range(metadata.num_inputs())]
    names = _names(program, "input_names") or [f"input{index}" for index in range(len(tensors))]
    batched = _names(program, "batched_inputs") or names
    # A program plans its memory for the largest batch that it was made for; larger ones run in several calls.
    inputs = [
        InputInfo(
            name,
            (None, *item.sizes()[1:]) if name in batched else tuple(item.sizes()),
            _TORCH_CODES.get(item.dtype(), "float32"),
        )
        for name, item in zip(names, tensors, strict=True)
    ]
    rows = next((item.sizes()[0] for name, item in zip(names, tensors, strict=True) if name in batched), 1)

    def run(arrays: Sequence[Array]) -> Sequence[Array]:
        whole = [info.shape[:1] != (None,) for info in inputs]
        counts = {len(array) for array, fixed in zip(arrays, whole, strict=True) if not fixed} or {rows}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(f"the inputs of {path.name} must have as many rows each, one or more, got {counts}")
        parts, (count,) = [], counts
        for start in range(0, count, rows):
            part = [array if fixed else array[start : start + rows] for array, fixed in zip(arrays, whole, strict=True)]
            values = [torch.from_numpy(array) for array in part]
            # A copy: the next call writes its outputs to the same memory.
            parts.append([output.numpy().copy() for output in method.execute(values)])
            if count > rows and any(output.shape[:1] != (len(values[whole.index(False)]),) for output in parts[-1]):
                shapes = [output.shape for output in parts[-1]]
                raise ValueError(
                    f"{path.name} must get at most {rows} rows, got {count}: its outputs, of shapes {shapes}, have"
                    " other sizes in front, and cannot be joined"
                )
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    return Session(
        run,
        path=path,
        runtime=f"ExecuTorch {version('executorch')}",
        threads=threads,
        inputs=inputs,
        outputs=_names(program, "output_names") or [f"output{index}" for index in range(metadata.num_outputs())],
    )


def _names(program: Any, method: str) -> list[str]:
    """Return what a program says about its inputs and outputs; programs of other makers say nothing."""
    if method not in program.method_names:
        return []
    (joined,) = program.load_method(method).execute(())
    return [name for name in str(joined).split(",") if name]


_RUNTIMES: dict[str | None, Callable[[bytes | str, Path, int], Session]] = {None: _onnxruntime, "openvino": _openvino}
_TORCH_CODES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}


def _numpy_name(onnx_type: str) -> str:
    """Return numpy's name of ``tensor(float)`` and the like."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _check(path: Path, item: InputInfo, array: Array) -> None:
    fits = array.ndim == len(item.shape) and all(
        want is None or want == got for want, got in zip(item.shape, array.shape, strict=False)
    )
    if not fits or array.dtype.name != item.dtype:
        wanted = tuple("any" if size is None else size for size in item.shape)
        raise ValueError(
            f"input {item.name!r} of {path.name} must be {item.dtype} of shape {wanted}, got {array.dtype} of"
            f" {array.shape}"
        )
