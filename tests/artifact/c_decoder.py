"""Compiles the C decoder with a small program around it, and runs that program on files."""

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "lightning_edge" / "artifact" / "c"
COMPILER = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")

# Every piece of memory has exactly the size that was asked for, and begins at an odd address: an access beyond it, or
# one that needs alignment, is seen. Input: size and bytes of each file. Output: for each tensor 0, its type, number of
# dimensions, dimensions, size and bytes; then what ended the file.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "edge_decode.h"

static void put(size_t value) {
    const uint32_t number = (uint32_t)value;
    fwrite(&number, sizeof number, 1, stdout);
}

static uint8_t *memory(size_t size) { return (uint8_t *)malloc(size + 1) + 1; }

/* One byte less than the tensor says must be refused. */
static void check_sizes(const EdgeTensor *t, uint8_t *data, uint8_t *workspace) {
    const size_t size = t->data_size, needed = t->workspace_size;
    if (size > 0 && edge_decode(t, data, size - 1, workspace, needed) != EDGE_NO_MEMORY) exit(3);
    if (needed > 0 && edge_decode(t, data, size, workspace, needed - 1) != EDGE_NO_MEMORY) exit(3);
}

static EdgeStatus expand(EdgeFile *file, int seconds_only, double *seconds) {
    EdgeTensor tensor;
    EdgeStatus status = edge_next(file, &tensor);
    if (status != EDGE_OK) return status;
    uint8_t *data = memory(tensor.data_size), *workspace = memory(tensor.workspace_size);
    memset(data, 0xA5, tensor.data_size);
    memset(workspace, 0xA5, tensor.workspace_size);
    check_sizes(&tensor, data, workspace);
    const clock_t start = clock();
    status = edge_decode(&tensor, data, tensor.data_size, workspace, tensor.workspace_size);
    *seconds += (double)(clock() - start) / CLOCKS_PER_SEC;
    if (status == EDGE_OK && !seconds_only) {
        put(EDGE_OK);
        put(tensor.dtype);
        put(tensor.dimensions);
        for (uint32_t i = 0; i < tensor.dimensions; ++i) put(tensor.shape[i]);
        put(tensor.workspace_size);
        put(tensor.data_size);
        fwrite(data, 1, tensor.data_size, stdout);
    }
    free(data - 1);
    free(workspace - 1);
    return status;
}

int main(int argc, char **argv) {
    uint32_t size;
    (void)argv;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *bytes = memory(size);
        EdgeFile file;
        double seconds = 0;
        if (fread(bytes, 1, size, stdin) != size) return 2;
        EdgeStatus status = edge_open(bytes, size, &file);
        while (status == EDGE_OK) status = expand(&file, argc > 1, &seconds);
        if (argc > 1) printf("%s %.6f\n", status == EDGE_END ? "seconds" : edge_status_text(status), seconds);
        else put(status);
        free(bytes - 1);
    }
    return 0;
}
"""
OK, END, NO_EDGE, VERSION, CHECKSUM, DAMAGED, NO_MEMORY = range(7)


@dataclass(frozen=True)
class Expanded:
    """A tensor as the C decoder wrote it."""

    dtype: int
    shape: tuple[int, ...]
    workspace_size: int
    data: bytes


def compile_program(folder: Path, *flags: str) -> Path:
    """Return the program, made with these flags."""
    (folder / "driver.c").write_text(DRIVER)
    program = folder / "decode"
    command = [COMPILER, *STRICT, *flags, f"-I{SOURCES}", folder / "driver.c", SOURCES / "edge_decode.c", "-o", program]
    subprocess.run(command, check=True)
    return program


def run(program: Path, files: list[bytes]) -> list[tuple[list[Expanded], int]]:
    """Return, for each file, its tensors, and the status that ended it."""
    fed = b"".join(struct.pack("<I", len(file)) + file for file in files)
    done = subprocess.run([program], input=fed, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    place, results = 0, []
    for _ in files:
        tensors = []
        while True:
            status, dtype, dimensions = struct.unpack_from("<III", done.stdout.ljust(place + 12, b"\0"), place)
            if status != OK:
                results.append((tensors, status))
                place += 4
                break
            shape = struct.unpack_from(f"<{dimensions}I", done.stdout, place + 12)
            workspace_size, size = struct.unpack_from("<II", done.stdout, place + 12 + 4 * dimensions)
            place += 20 + 4 * dimensions + size
            tensors.append(Expanded(dtype, shape, workspace_size, done.stdout[place - size : place]))
    return results


def seconds(program: Path, file: bytes, *, repeats: int) -> float:
    """Return the fewest seconds, of some runs, in which all tensors of a file were expanded."""
    fed = (struct.pack("<I", len(file)) + file) * repeats
    done = subprocess.run([program, "seconds"], input=fed, capture_output=True, check=True)
    words = done.stdout.decode().split()
    assert words[::2] == ["seconds"] * repeats, done.stdout
    return min(float(word) for word in words[1::2])
