"""Matrices on the device as the checkpoint stores them, and the two products that read them.

A packed weight stays packed: each plain product unpacks the one matrix, or bank of experts, that it needs, and lets it
go. What unpacking means is in ``dequantize.py``; the kernels that multiply packed weights are in ``kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.formats.encoding import Encoding

from .dequantize import dequantize
from .kernels.fp8_gemm import fits, fp8_linear_ops
from .kernels.quantize import Fp8Rows, Rows

PIECE = 2**25  # values unpacked at a time: in float32, 128 MiB


@dataclass(frozen=True)
class Dense:
    """[..., out, in] in the dtype it is used in."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)


@dataclass(frozen=True)
class Quantized:
    """``parts`` as ``encoding`` has them for a weight of ``shape``, [out, in] or [E, out, in].

    ``fp8_activations``: what it is multiplied with is rounded to FP8 first, so that the product itself is in FP8.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    fp8_activations: bool = False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The float32 values, each rounded once to ``dtype``; beside them, only ``PIECE`` of them are in float32."""
        if math.prod(self.shape) <= PIECE:
            return dequantize(self.encoding, self.parts).to(dtype)
        values = torch.empty(self.shape, dtype=dtype, device=self.parts["weight"].device)
        for start, stop in self._pieces():
            values[start:stop] = dequantize(self.encoding, self._rows(start, stop))
        return values

    @property
    def _edge(self) -> int:
        """How many rows of the first axis have one row of scales: those of a block; 1 where they have their own."""
        return (self.encoding.block or 1) if len(self.shape) == 2 else 1

    def _pieces(self) -> Iterator[tuple[int, int]]:
        step = max(1, PIECE // (math.prod(self.shape[1:]) * self._edge)) * self._edge
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def _rows(self, start: int, stop: int) -> dict[str, Tensor]:
        rows = {name: part[start:stop] for name, part in self.parts.items()}
        rows["scales"] = self.parts["scales"][start // self._edge : -(-stop // self._edge)]
        return rows


@dataclass(frozen=True)
class Stack:
    """Matrices that read the same input but are stored unlike, one behind the other along their rows."""

    pieces: tuple[Dense | Quantized, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([piece.dense(dtype) for piece in self.pieces])


Weight = Dense | Quantized | Stack


def takes_fp8(weight: Weight) -> bool:
    """Whether ``weight`` is multiplied with ``Fp8Rows``."""
    return isinstance(weight, Quantized) and weight.fp8_activations


def fp8_product(encoding: Encoding, shape: tuple[int, ...]) -> bool:
    """Whether a weight can be multiplied in FP8: one scale per row, and sizes that the hardware's product takes."""
    return encoding.mode == "fp8" and not encoding.block and fits(*shape[-2:])


def linear(x: Rows, weight: Weight, dtype: torch.dtype) -> Tensor:
    """x [N, in] times the transposed weight [out, in]: [N, out] in ``dtype``."""
    if isinstance(x, Fp8Rows):
        assert isinstance(weight, Quantized) and weight.fp8_activations
        return fp8_linear_ops(x, weight.parts["weight"], weight.parts["scales"], dtype)
    return F.linear(x, weight.dense(dtype))


def grouped_linear(x: Tensor, bank: Weight, ends: Tensor) -> Tensor:
    """Rows x [N, in] sorted by expert, each times its expert's transposed matrix in ``bank`` [E, out, in]: [N, out].

    ``ends`` int32 [E]: where the rows of each expert end.
    """
    return F.grouped_mm(x, bank.dense(x.dtype).transpose(1, 2), offs=ends)
