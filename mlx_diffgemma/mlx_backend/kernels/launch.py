"""Starting a Metal kernel, in one place, so that something else can stand for the GPU: see ``running_on``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# An array that a rolled loop indexes lives in memory, and Apple's compiler does not unroll by itself.
PRELUDE = '#define UNROLLED _Pragma("clang loop unroll(full)")\n'
Shape = Sequence[int]
Runner = Callable[..., list[mx.array]]
_runner: Runner | None = None


@dataclass(frozen=True)
class Kernel:
    """The body of a Metal kernel, as ``mx.fast.metal_kernel`` takes it. A constant of its module, so it is made once.

    Args:
        inputs, outputs: names, in the order of the arguments.
        source: what stands between the braces. header: functions and structs that it uses. Both may mark a short loop
            over an array of a thread as UNROLLED.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""

    @functools.cached_property
    def made(self) -> Runner:
        kernel: Any = mx.fast.metal_kernel(self.name, self.inputs, self.outputs, self.source, PRELUDE + self.header)
        return kernel

    def __call__(
        self,
        *inputs: mx.array,
        template: dict[str, mx.Dtype | int | bool],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        shapes: Sequence[Shape],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Enqueue it over ``grid`` threads in groups of ``threadgroup``; outputs of ``shapes`` and ``dtypes``.

        Inputs that are not row-contiguous are copied by MLX first. ``template`` are its compile-time constants.
        """
        named: dict[str, Any] = {"template": list(template.items()), "grid": grid, "threadgroup": threadgroup}
        named |= {"output_shapes": [tuple(shape) for shape in shapes], "output_dtypes": list(dtypes)}
        if _runner is not None:
            return _runner(self, list(inputs), named)
        return self.made(inputs=list(inputs), **named)


def emulated() -> bool:
    """Whether something stands for the GPU."""
    return _runner is not None


def available() -> bool:
    """Whether kernels can run here: on a Metal GPU, or on what stands for it."""
    return _runner is not None or mx.metal.is_available()


@contextmanager
def running_on(runner: Runner) -> Iterator[None]:
    """Within, ``runner(kernel, inputs, arguments)`` runs every kernel; ``arguments`` are those of MLX's call."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before
