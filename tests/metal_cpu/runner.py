"""One call of a kernel on the CPU, as ``launch.running_on`` wants it."""

from __future__ import annotations

import ctypes
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.mlx_backend.kernels.launch import Kernel

from .compile import Compiled, compiled, engine
from .text import Generated, generated

MOST_THREADS = 1024
INPUT, POISONED, FILLED = range(3)  # kinds of buffers
REASON_BYTES = 512
_order = 0
_running = threading.Lock()  # the engine runs one kernel at a time


class Fault(RuntimeError):
    """The kernel did what it must not do."""


class Buffer(ctypes.Structure):
    """``MetalCpuBuffer`` of engine.cpp."""

    _fields_ = (("bytes", ctypes.c_void_p), ("size", ctypes.c_size_t), ("kind", ctypes.c_int))


@contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """Within, threadgroups, simdgroups and lanes run in another order: 0 ascending, 1 descending, else shuffled.

    The seed also chooses the byte that memory nobody wrote is filled with, so that what depends on it changes, too.
    """
    global _order
    before, _order = _order, seed
    try:
        yield
    finally:
        _order = before


def poison(order: int) -> int:
    """0xFF makes every float a NaN; the others are large or tiny numbers."""
    return 0xFF ^ (order * 0x25 & 0x7F)


def emulate(kernel: Kernel, inputs: list[mx.array], arguments: Mapping[str, Any]) -> list[mx.array]:
    """The outputs of ``kernel``; ``arguments`` are those of MLX's call. Raises ``Fault`` or ``compile.NotMetal``."""
    made = generated(kernel, inputs, arguments)
    check_sizes(kernel.name, made)
    program = compiled(made.text)
    arrays = dict(zip(kernel.inputs, readable(inputs), strict=True))
    kinds = dict.fromkeys(arrays, INPUT)
    for name, shape, dtype in zip(kernel.outputs, arguments["output_shapes"], arguments["output_dtypes"], strict=True):
        arrays[name], kinds[name] = unwritten(shape, dtype, arguments.get("init_value"))
    for name in program.buffers:
        if name not in arrays:
            arrays[name], kinds[name] = described(name, dict(zip(kernel.inputs, inputs, strict=True))), INPUT
    launch(kernel.name, made, program, arrays, kinds)
    return [
        finished(arrays[name], dtype) for name, dtype in zip(kernel.outputs, arguments["output_dtypes"], strict=True)
    ]


def check_sizes(name: str, made: Generated) -> None:
    threads = math.prod(min(most, n) for most, n in zip(made.threadgroup, made.grid, strict=True))
    if min(made.grid + made.threadgroup) < 1:
        raise Fault(f"{name}: nothing to run over grid {made.grid} in threadgroups of {made.threadgroup}")
    if threads > MOST_THREADS:
        raise Fault(f"{name}: {threads} threads in a threadgroup, more than {MOST_THREADS}")


def readable(inputs: list[mx.array]) -> list[np.ndarray]:
    """Row-contiguous, as MLX makes them; bfloat16, which NumPy lacks, as its bits."""
    rows = [mx.contiguous(x) for x in inputs]
    rows = [x.view(mx.uint16) if x.dtype == mx.bfloat16 and x.size else x for x in rows]
    mx.eval(rows)
    return [np.array(x, copy=False) if x.size else np.empty(0, np.uint8) for x in rows]


def unwritten(shape: tuple[int, ...], dtype: mx.Dtype, initial: float | None) -> tuple[np.ndarray, int]:
    """An output as the kernel finds it, and the kind of its buffer."""
    stored = mx.uint16 if dtype == mx.bfloat16 else dtype
    out = np.empty(shape, str(stored).rpartition(".")[2].removesuffix("_"))
    if initial is not None:
        filled = mx.full(shape, initial, dtype)
        out[...] = np.array(filled.view(mx.uint16) if dtype == mx.bfloat16 and filled.size else filled)
        return out, FILLED
    if dtype == mx.bool_:  # other bytes than 0 and 1 are no bool
        out[...] = _order % 2 == 0
        return out, FILLED
    return out, POISONED


def described(name: str, inputs: Mapping[str, mx.array]) -> np.ndarray:
    """``x_shape``, ``x_strides`` or ``x_ndim`` of a row-contiguous input."""
    which, _, what = name.rpartition("_")
    if which not in inputs or what not in ("shape", "strides", "ndim"):
        raise Fault(f"unknown buffer: {name}")
    shape = inputs[which].shape
    if what == "strides":
        return np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)
    return np.array(shape if what == "shape" else len(shape), np.int32)


def launch(name: str, made: Generated, program: Compiled, arrays: dict[str, np.ndarray], kinds: dict[str, int]) -> None:
    """Run it; outputs are written in place."""
    buffers = [Buffer(arrays[b].ctypes.data, arrays[b].nbytes, kinds[b]) for b in program.buffers]
    reason = ctypes.create_string_buffer(REASON_BYTES)
    three = ctypes.c_uint * 3
    with _running:
        failed = engine().metal_cpu_launch(
            ctypes.c_void_p(program.body), (Buffer * len(buffers))(*buffers), len(buffers),
            three(*made.grid), three(*made.threadgroup), ctypes.c_uint(_order), poison(_order), reason,
        )  # fmt: skip
    if failed:
        what = re.sub(r"\bbuffer (\d+)\b", lambda n: f"{program.buffers[int(n[1])]}", reason.value.decode())
        raise Fault(f"{name}: {what}")


def finished(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    if not x.size:
        return mx.zeros(x.shape, dtype)
    out = mx.array(x)
    return out.view(mx.bfloat16) if dtype == mx.bfloat16 else out
