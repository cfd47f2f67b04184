"""Packed weights to float32 in torch operations: the numbers of ``mlx_diffgemma.formats.numbers``, bit for bit.

``formats.encoding`` has the table of modes and parts. Products and sums are rounded one after the other, never fused,
as NumPy rounds them. Nothing is read by the host and no shape depends on data, so a CUDA graph can hold it all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mlx_diffgemma.formats.encoding import Encoding

Parts = Mapping[str, Tensor]


def dequantize(encoding: Encoding, parts: Parts) -> Tensor:
    """float32 [..., out, in] of the parts of any mode but dense; equals ``Encoded.decode()``."""
    weight, scales = parts["weight"], parts["scales"]
    if encoding.mode == "affine":
        return scaled(codes(weight, encoding.bits).float(), scales.float(), parts["biases"].float())
    if encoding.mode == "fp8":
        values, scales = e4m3(weight), scales.float()
        return blocked(values, scales, encoding.block) if encoding.block else scaled(values, scales)
    if encoding.mode == "nvfp4":
        steps = e4m3(scales)
        if encoding.global_scale:
            steps *= parts["global_scale"][..., None]
        return scaled(e2m1(codes(weight, 4)), steps)
    assert encoding.mode in ("mxfp4", "mxfp8"), encoding
    values = e2m1(codes(weight, 4)) if encoding.mode == "mxfp4" else e4m3(codes(weight, 8))
    return scaled(values, scales.view(torch.float8_e8m0fnu).float())


def codes(words: Tensor, bits: int) -> Tensor:
    """uint32 [..., n * bits / 32] -> uint8 [..., n]. A row is one little-endian stream, lowest bits first.

    Every ``period`` codes fill whole bytes, so the k-th code of all periods lies at the same place and comes at once.
    """
    period = 8 // math.gcd(bits, 8)
    stream = words.view(torch.uint8).unflatten(-1, (-1, period * bits // 8))
    found = torch.empty((*stream.shape[:-1], period), dtype=torch.uint8, device=words.device)
    for k in range(period):
        byte, shift = divmod(k * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:  # it runs on into the next byte
            code |= stream[..., byte + 1] << (8 - shift)
        found[..., k] = code & (2**bits - 1)
    return found.flatten(-2)


def e4m3(found: Tensor) -> Tensor:
    """Codes as uint8 or float8_e4m3fn -> float32."""
    return found.view(torch.float8_e4m3fn).float()


def e2m1(codes: Tensor) -> Tensor:
    """Codes below 16 as uint8 -> float32. In e4m3's places, sign, exponent and mantissa stand for 1/64 of the value."""
    return e4m3((codes & 8) << 4 | (codes & 7) << 2).mul_(64)


def scaled(values: Tensor, scales: Tensor, biases: Tensor | None = None) -> Tensor:
    """values * scales + biases in place: [..., in] with one scale and bias [..., groups] for each group of a row."""
    groups = values.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None])
    if biases is not None:
        groups += biases[..., None]
    return values


def blocked(values: Tensor, scales: Tensor, edge: int) -> Tensor:
    """values [..., out, in] times scales [..., ceil(out / edge), ceil(in / edge)], in place."""
    rows = scales.repeat_interleave(edge, -2)[..., : values.shape[-2], :]
    whole = values.shape[-1] // edge
    values[..., : whole * edge].unflatten(-1, (whole, edge)).mul_(rows[..., :whole, None])
    values[..., whole * edge :] *= rows[..., whole:]  # a partial block, or nothing
    return values
