"""Weights from a checkpoint to MLX arrays, one tensor at a time, in the precision each is used in."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import mlx.core as mx
import numpy as np

from ..backend import Remarks
from ..errors import OptionError
from ..formats import Checkpoint
from ..formats.encoding import GROUPS, WIDTHS, Encoded
from ..formats.stored import Stored
from ..tensors import VISION
from .kernels.elementary import on_cpu
from .linear import Dense, Linear, Quantized
from .remarks import remarks

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
ONE = 127  # 2^0 as an e8m0 byte
PIECE = 2**26  # most values unpacked at once
Ones = dict[tuple[int, ...], mx.array]  # all-one group scales by shape: one array serves all layers


@dataclass(frozen=True)
class Weights:
    """Everything by canonical name, the dtype of activations, and what ``describe()`` says of it all.

    ``matrices`` are all tensors of two axes or more, ``arrays`` the others.
    """

    matrices: dict[str, Linear]
    arrays: dict[str, mx.array]
    dtype: str
    remarks: Remarks

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
    return Weights(matrices, arrays, dtype, remarks(checkpoint, matrices, arrays, DTYPES[dtype]))


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


def to_mlx(array: np.ndarray) -> mx.array:
    """The same bits as an MLX array; NumPy's bfloat16 goes over as integers, since MLX would widen it."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.asarray(array))
