"""What MLX makes of a kernel: the text of a Metal function, taken from MLX itself.

``mx.fast.metal_kernel`` refuses to run without Metal, but while a function is traced for export it generates the same
text and hands it out with the grid. Nothing of MLX's generator is written again here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_diffgemma.mlx_backend.kernels.launch import Kernel

Signature = tuple[Any, ...]
# name, text, grid, threadgroup, which inputs have (shape, strides, ndim), ensure_row_contiguous, scalars, precompiled,
# threadgroup memory, math mode
FIELDS = [str, str, *[int] * 6, list, bool, list, bool, int, int]
MATH_MODE_SAFE = 0


@dataclass(frozen=True)
class Generated:
    """One kernel for one choice of template values, shapes and dtypes.

    Args:
        text: as MLX would give it to Metal's compiler, after its own headers.
        grid, threadgroup: x, y, z, in threads.
    """

    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def generated(kernel: Kernel, inputs: list[mx.array], arguments: Mapping[str, Any]) -> Generated:
    """The text of one call; ``arguments`` are those of MLX's call, without the inputs."""
    signature = tuple((tuple(x.shape), x.dtype) for x in inputs)
    frozen = tuple((name, freeze(value)) for name, value in sorted(arguments.items()) if name != "init_value")
    return _trace(kernel, signature, frozen)


def freeze(value: Any) -> Any:
    """Lists as tuples, so that it can be the key of a cache. True and 1 stay different: they make different texts."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return (type(value), value)


def thaw(value: Any) -> Any:
    return value[1] if value and isinstance(value[0], type) else [thaw(item) for item in value]


@functools.lru_cache(maxsize=4096)
def _trace(kernel: Kernel, signature: Signature, frozen: Signature) -> Generated:
    arguments = {name: thaw(value) for name, value in frozen}
    if "template" in arguments:
        arguments["template"] = [tuple(pair) for pair in arguments["template"]]
    nodes: list[dict[str, Any]] = []
    zeros = [mx.zeros(shape, dtype) for shape, dtype in signature]
    mx.export_function(nodes.append, lambda *xs: kernel.made(inputs=list(xs), **arguments), *zeros)
    primitives = [node for node in nodes if node.get("type") == "primitive"]
    if [node.get("name") for node in primitives] != ["CustomKernel"]:
        raise RuntimeError(f"{kernel.name}: MLX traced {primitives}, not one CustomKernel")
    return read_node(kernel.name, primitives[0]["arguments"])


def read_node(name: str, node: list[Any]) -> Generated:
    """The fields of MLX 0.32's ``CustomKernel``; whatever it has that this runner does not know is refused."""
    if [type(field) for field in node] != FIELDS:
        raise RuntimeError(f"{name}: the fields of MLX's CustomKernel are not those of 0.32: {node}")
    _, text, *sizes, strides, contiguous, scalars, precompiled, memory, mode = node
    if not contiguous:
        raise RuntimeError(f"{name}: ensure_row_contiguous=False is not emulated")
    if scalars or precompiled or memory or mode != MATH_MODE_SAFE or not all(len(three) == 3 for three in strides):
        raise RuntimeError(f"{name}: this kind of CustomKernel is not emulated: {node[2:]}")
    return Generated(text, tuple(sizes[:3]), tuple(sizes[3:]))
