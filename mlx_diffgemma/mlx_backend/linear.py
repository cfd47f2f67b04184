"""Matrices as the checkpoint stores them: ``Dense``, or ``Quantized`` and never unpacked as a whole.

The network knows four products and not which class it has. Products of quantized matrices are MLX's own kernels.
What MLX has no mode for is a float32 factor per row, applied in float32 outside the kernel: the global scale of nvfp4,
and the channel scale of FP8, whose codes are those of mxfp8 with every group's scale at 2^0.

Rounding: MLX widens scales and activations to the wider of the two, so no stored scale is ever rounded. On the CPU
its bfloat16 kernels also add up in bfloat16 (2 % off); there the activations of every quantized product are widened to
float32 first (``dtype``). Metal adds up in float32 and gets them as they are. Either way the result has the dtype of
the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


class Linear(Protocol):
    """W [out, in], or a bank of them [E, out, in]."""

    @property
    def dtype(self) -> mx.Dtype:
        """What activations have inside its products."""
        ...

    @property
    def arrays(self) -> tuple[mx.array, ...]: ...

    def apply(self, x: mx.array) -> mx.array:
        """x @ W.T: [..., in] to [..., out]."""
        ...

    def combine(self, x: mx.array) -> mx.array:
        """x @ W: [..., out] to [..., in], the rows of W weighted by ``x``."""
        ...

    def rows(self, ids: mx.array) -> mx.array:
        """Rows ``ids`` [...]: [..., in], exact; float32 where a dtype of the model would round them."""
        ...

    def gather(self, x: mx.array, expert: mx.array) -> mx.array:
        """Of a bank: row n of ``x`` [N, 1, in] times the transposed matrix ``expert[n]``, ascending: [N, 1, out]."""
        ...


@dataclass(frozen=True)
class Dense:
    weight: mx.array

    @property
    def dtype(self) -> mx.Dtype:
        return self.weight.dtype

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.weight,)

    def apply(self, x: mx.array) -> mx.array:
        return x @ self.weight.T

    def combine(self, x: mx.array) -> mx.array:
        return x @ self.weight

    def rows(self, ids: mx.array) -> mx.array:
        return self.weight[ids]

    def gather(self, x: mx.array, expert: mx.array) -> mx.array:
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=expert, sorted_indices=True)


@dataclass(frozen=True)
class Quantized:
    """The parts of ``formats.encoding``, and

    Args:
        dtype: see ``Linear``.
        row_scale: float32 [..., out], or ``None``.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    mode: str
    bits: int
    group_size: int
    dtype: mx.Dtype
    row_scale: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(x for x in (self.weight, self.scales, self.biases, self.row_scale) if x is not None)

    def apply(self, x: mx.array) -> mx.array:
        return self._scaled(self._product(x, transpose=True), self.row_scale).astype(x.dtype)

    def combine(self, x: mx.array) -> mx.array:
        return self._product(self._scaled(x, self.row_scale), transpose=False).astype(x.dtype)

    def rows(self, ids: mx.array) -> mx.array:
        scales, biases = self.scales[ids], None if self.biases is None else self.biases[ids].astype(mx.float32)
        values = mx.dequantize(
            self.weight[ids],
            scales if biases is None else scales.astype(mx.float32),
            biases,
            self.group_size,
            self.bits,
            self.mode,
            dtype=mx.float32,
        )
        return self._scaled(values, None if self.row_scale is None else self.row_scale[ids][..., None])

    def gather(self, x: mx.array, expert: mx.array) -> mx.array:
        out = mx.gather_qmm(
            x.astype(self.dtype),
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=expert,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=True,
        )
        return self._scaled(out, None if self.row_scale is None else self.row_scale[expert][:, None]).astype(x.dtype)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            x.astype(self.dtype),
            self.weight,
            self.scales,
            self.biases,
            transpose,
            self.group_size,
            self.bits,
            self.mode,
        )

    @staticmethod
    def _scaled(x: mx.array, scale: mx.array | None) -> mx.array:
        return x if scale is None else x.astype(mx.float32) * scale
