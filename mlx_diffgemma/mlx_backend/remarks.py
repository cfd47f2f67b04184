"""What ``describe()`` says of the weights: the formats they are held in, and what is not as it is on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import mlx.core as mx
import numpy as np

from ..backend import TEXT_ONLY, Remarks
from ..formats import Checkpoint
from ..formats.stored import Stored
from .kernels.elementary import on_cpu
from .linear import Dense, Linear, Quantized


def remarks(
    checkpoint: Checkpoint, matrices: dict[str, Linear], arrays: dict[str, mx.array], dtype: mx.Dtype
) -> Remarks:
    """Of the text model of ``checkpoint``, computed in ``dtype``."""
    stored = {name: checkpoint.tensors[name] for name in (*matrices, *arrays)}
    dense = arrays | {name: matrix.weight for name, matrix in matrices.items() if isinstance(matrix, Dense)}
    formats = Counter(_held(one, dense.get(name)) for name, one in stored.items())
    unpacked = {name: stored[name] for name in dense if stored[name].quantized}
    narrow = [name for name, array in dense.items() if array.dtype == mx.bfloat16]
    coarse = _listed(unpacked[name].format for name in narrow if name in unpacked)
    notes = [*_widened(checkpoint, matrices, dtype)]
    if unpacked:
        what = _listed(one.format for one in unpacked.values())
        notes.append(f"dequantized at load, as MLX has no product for it: {what}")
    rounded = _listed(stored[n].format for n in narrow if n not in unpacked and _rounded(stored[n], dense[n]))
    if rounded:
        notes.append(f"{rounded} weights are rounded to bfloat16; dtype='float32' keeps them")
    if checkpoint.config.vision:
        notes.append(TEXT_ONLY)
    return Remarks(
        dict(formats), (f"dequantized weights ({coarse}) are rounded to bfloat16",) if coarse else (), tuple(notes)
    )


def _listed(formats: Iterable[str]) -> str:
    return ", ".join(sorted(set(formats)))


def _held(stored: Stored, dense: mx.array | None) -> str:
    if dense is None or not stored.quantized:
        return stored.format
    return f"{str(dense.dtype).rpartition('.')[2]} from {stored.format}"


def _rounded(stored: Stored, held: mx.array) -> bool:
    """Whether bfloat16 lost something: vectors are compared, of matrices the format decides."""
    if stored.encoding.dtype == "bfloat16":
        return False
    return held.ndim > 1 or not np.array_equal(stored.read().decode(), np.array(held.astype(mx.float32)))


def _widened(checkpoint: Checkpoint, matrices: dict[str, Linear], dtype: mx.Dtype) -> Iterator[str]:
    """Which products are computed in float32 although activations are bfloat16."""
    if dtype == mx.float32:
        return
    packed = [matrix for matrix in matrices.values() if isinstance(matrix, Quantized)]
    banks = [matrices[name] for name, row in checkpoint.table.items() if row.role == "experts"]
    if on_cpu() and any(isinstance(bank, Dense) for bank in banks):
        yield "experts are computed in float32: MLX has no bfloat16 gather_mm on the CPU"
    if on_cpu() and packed:
        yield "quantized products are computed in float32: on the CPU, MLX's others add up in bfloat16"
    elif any(matrix.scales.dtype not in (mx.uint8, dtype) for matrix in packed):
        yield "quantized products are computed in float32 where the scales are no bfloat16 numbers"
