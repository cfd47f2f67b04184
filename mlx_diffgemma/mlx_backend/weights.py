"""Weights from a checkpoint to MLX arrays, one tensor at a time, in the precision each is used in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ml_dtypes
import mlx.core as mx
import numpy as np

from ..backend import TEXT_ONLY
from ..errors import OptionError
from ..formats import Checkpoint
from ..formats.encoding import GROUPS, WIDTHS, Encoded
from ..formats.stored import Stored
from ..tensors import VISION
from .linear import Dense, Linear, Quantized

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
ONE = 127  # 2^0 as an e8m0 byte
PIECE = 2**26  # most values unpacked at once
Ones = dict[tuple[int, ...], mx.array]  # all-one group scales by shape: one array serves all layers


@dataclass(frozen=True)
class Weights:
    """Everything by canonical name, and what ``describe()`` says of it.

    Args:
        matrices: all tensors of two axes or more.  arrays: the others.
        dtype: of activations.
        formats: how many tensors are held in each number format.
    """

    matrices: dict[str, Linear]
    arrays: dict[str, mx.array]
    dtype: str
    formats: dict[str, int]
    notes: tuple[str, ...]
    approximations: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        every = [*self.arrays.values(), *(array for matrix in self.matrices.values() for array in matrix.arrays)]
        return sum(array.nbytes for array in {id(array): array for array in every}.values())


def read_weights(checkpoint: Checkpoint, dtype: str | None) -> Weights:
    """All text weights, evaluated. Quantized matrices keep their bytes, all else gets the dtype of activations.

    But norm weights and per-expert scales become float32, because they enter float32 arithmetic; without a GPU dense
    expert banks do too, because ``mx.gather_mm`` exists there in float32 only.

    Raises:
        OptionError: a dtype other than bfloat16 and float32.
    """
    dtype = dtype or checkpoint.dtype
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r} is unknown; choose {' or '.join(DTYPES)}")
    matrices, arrays, ones = dict[str, Linear](), dict[str, mx.array](), Ones()
    for name, row in checkpoint.table.items():
        if row.role in VISION:
            continue
        # Evaluated one at a time, so that the stored and the converted copy exist for one tensor only.
        if len(row.shape) > 1:
            matrices[name] = matrix(checkpoint.tensors[name], row.role == "experts", DTYPES[dtype], ones)
            mx.eval(*matrices[name].arrays)
        else:
            wide = row.role == "norm" or name.endswith("per_expert_scale")
            arrays[name] = to_mlx(checkpoint.read(name)).astype(mx.float32 if wide else DTYPES[dtype])
            mx.eval(arrays[name])
    formats = {name: _format(checkpoint, name, matrices.get(name), dtype) for name in (*matrices, *arrays)}
    notes, approximations = _remarks(checkpoint, matrices, arrays, dtype)
    return Weights(matrices, arrays, dtype, dict(Counter(formats.values())), notes, approximations)


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def matrix(stored: Stored, experts: bool, dtype: mx.Dtype, ones: Ones) -> Linear:
    """Quantized where MLX has a product for it, else dense; ``linear`` says why the CPU's products are float32."""
    encoding, product = stored.encoding, mx.float32 if on_cpu() else dtype
    if encoding.mode == "fp8" and not encoding.block and stored.shape[-1] % GROUPS["mxfp8"] == 0:
        return _channels(stored.read(), product, ones)
    if encoding.mode in ("dense", "fp8"):
        return Dense(_values(stored, product if experts else dtype))
    parts = {name: to_mlx(part) for name, part in stored.read().parts.items()}
    form = (encoding.mode, encoding.bits, encoding.group_size)
    return Quantized(parts["weight"], parts["scales"], parts.get("biases"), *form, product, parts.get("global_scale"))


def _values(stored: Stored, dtype: mx.Dtype) -> mx.array:
    """In ``dtype``. What must be unpacked is so some rows at a time, since it passes through float32."""
    pieces: list[mx.array] = []
    align = stored.encoding.block if len(stored.shape) == 2 else 0
    for start, stop in stored.chunks(PIECE, align or 1) if stored.quantized else [(0, stored.shape[0])]:
        pieces.append(to_mlx(stored.read(start, stop).decode()).astype(dtype))
        mx.eval(pieces[-1])
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


def _channels(stored: Encoded, product: mx.Dtype, ones: Ones) -> Quantized:
    """FP8 with a scale per row: the same bytes read as mxfp8, with every group's scale at 1. Codes of nan stay nan."""
    group, codes = GROUPS["mxfp8"], np.ascontiguousarray(stored.parts["weight"])
    shape = (*stored.shape[:-1], stored.shape[-1] // group)
    if shape not in ones:
        ones[shape] = mx.full(shape, ONE, mx.uint8)
    rows = to_mlx(stored.parts["scales"][..., 0]).astype(mx.float32)
    words = to_mlx(codes.view(np.uint8).view(np.uint32))
    return Quantized(words, ones[shape], None, "mxfp8", WIDTHS["mxfp8"], group, product, rows)


def _unpacked(checkpoint: Checkpoint, name: str, matrix: Linear | None) -> bool:
    return checkpoint.tensors[name].quantized and not isinstance(matrix, Quantized)


def _format(checkpoint: Checkpoint, name: str, matrix: Linear | None, dtype: str) -> str:
    stored = checkpoint.tensors[name].format
    return f"{dtype} from {stored}" if _unpacked(checkpoint, name, matrix) else stored


def _remarks(
    checkpoint: Checkpoint, matrices: dict[str, Linear], arrays: dict[str, mx.array], dtype: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and approximations."""
    notes, approximations = [], []
    packed = [matrix for matrix in matrices.values() if isinstance(matrix, Quantized)]
    banks = [matrices[name] for name, row in checkpoint.table.items() if row.role == "experts"]
    if on_cpu() and dtype != "float32":
        if any(isinstance(bank, Dense) for bank in banks):
            notes.append("experts are computed in float32: MLX has no bfloat16 gather_mm on the CPU")
        if packed:
            notes.append("quantized products are computed in float32: on the CPU, MLX's others add up in bfloat16")
    elif any(matrix.scales.dtype not in (mx.uint8, DTYPES[dtype]) for matrix in packed):
        notes.append("some quantized products are computed in float32: their scales are no bfloat16 numbers")
    dense = {name: checkpoint.tensors[name] for name in matrices if _unpacked(checkpoint, name, matrices[name])}
    unpacked = ", ".join(sorted({stored.format for stored in dense.values()}))
    if unpacked:
        notes.append(f"{unpacked} is dequantized at load: MLX has no product for it")
    if dtype == "bfloat16":
        if unpacked:
            approximations.append(f"dequantized weights ({unpacked}) are rounded to bfloat16")
        held = arrays | {name: matrix.arrays[0] for name, matrix in matrices.items()}
        narrow = {checkpoint.tensors[name].format for name, array in held.items() if array.dtype == mx.bfloat16}
        wide = narrow & {"float16", "float32"}
        notes += [f"{name} weights are rounded to bfloat16; dtype='float32' keeps them" for name in sorted(wide)]
    if checkpoint.config.vision:
        notes.append(TEXT_ONLY)
    return tuple(notes), tuple(approximations)


def to_mlx(array: np.ndarray) -> mx.array:
    """The same bits as an MLX array; NumPy's bfloat16 goes over as integers, since MLX would widen it."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.asarray(array))
