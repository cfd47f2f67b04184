"""Ways to store a matrix that several foreign formats share, as encodings of ours; nothing is read until asked for.

Shapes are [..., out, in] of the logical tensor. Every function checks the parts it is given against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .encoding import DTYPES, Encoded, Encoding, Mode, grouped
from .mlx import PerRow
from .stored import Part, Stored, plain

SOURCE = "google/diffusiongemma-26B-A4B-it"
U8, U32, I8, I32 = (np.dtype(kind) for kind in (np.uint8, np.uint32, np.int8, np.int32))
E4M3, E8M0 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e8m0fnu)
FLOATS = tuple(DTYPES.values())
EDGES = range(1, 10_000)  # of FP8's blocks; unpacking repeats a scale as often, so it must have an end
NVFP4 = Encoding("nvfp4", bits=4, group_size=16, global_scale=True)


def take(parts: Mapping[str, Part], *names: str, optional: tuple[str, ...] = ()) -> list[Part]:
    """The parts of a module called ``names``, when it has all of them and no other.

    Raises:
        CheckpointError: a part is missing, or one too many.
    """
    module, path = module_of(parts)
    for name in names:
        if name not in parts:
            raise CheckpointError(f"{path}: {module} has {_listed(parts)} but lacks {name}; download it again")
    odd = set(parts) - {*names, *optional}
    if odd:
        refuse(parts[min(odd)], f"beside {_listed(names)} is a combination that this library does not read")
    return [parts[name] for name in names]


def module_of(parts: Mapping[str, Part]) -> tuple[str, str]:
    """The name that a module has in the file, for messages, and the file."""
    kind, part = next(iter(parts.items()))
    name = part.name.removesuffix(f".{kind}")
    return name.removesuffix(kind.removeprefix("weight")), str(part.path)  # or it is glued on


def refuse(part: Part, why: str) -> NoReturn:
    raise CheckpointError(f"{part.path}: {part.name} {why}; convert from {SOURCE} instead")


def expect(part: Part, shape: tuple[int, ...] | None, *dtypes: np.dtype) -> None:
    """Check a part of the file; ``shape`` None is any.

    Raises:
        CheckpointError: naming what is there and what should be.
    """
    if part.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.dtype}, expected {names}; download it again, or convert from {SOURCE}"
        )
    if shape is not None and part.shape != shape:
        raise CheckpointError(
            f"{part.path}: {part.name} has shape {part.shape}, config.json calls for {shape}; are they of one model?"
        )


def whole_groups(part: Part, encoding: Encoding, shape: tuple[int, ...]) -> None:
    """Check that a tensor of ``shape`` can be ``encoding`` at all."""
    if not encoding.fits(shape):
        raise CheckpointError(
            f"{part.path}: {part.name} belongs to a tensor of shape {shape}, which cannot be {encoding}; "
            "are config.json and the weights of one model?"
        )


def nvfp4(shape: tuple[int, ...], weight: Part, scales: Part, scale: Part, *, divides: bool = False) -> Stored:
    """NVFP4 with a second scale; the bytes of codes and scales are MLX's.

    Args:
        weight: uint8 [..., out, in / 2], the first code in the low half.
        scales: e4m3 [..., out, in / 16].
        scale: float32, [] or [1], or one per matrix.
        divides: the second scale is a divisor. It is inverted in float32, as vLLM does; the values then differ from
            those of compressed-tensors, which divides, by at most two roundings of float32.
    """
    whole_groups(weight, NVFP4, shape)
    expect(weight, (*shape[:-1], shape[-1] // 2), U8)
    expect(scales, (*shape[:-1], shape[-1] // 16), E4M3)
    expect(scale, None, DTYPES["float32"])
    rows = PerRow(scale, shape[:-1])

    def load(start: int, stop: int) -> Encoded:
        each = rows.read(start, stop)
        parts = {
            "weight": viewed(weight.read(start, stop), U32),
            "scales": scales.read(start, stop).view(U8),
            "global_scale": np.float32(1) / each if divides else np.ascontiguousarray(each),
        }
        return Encoded(NVFP4, (stop - start, *shape[1:]), parts)

    return Stored(NVFP4, shape, (weight, scales, scale), load, "", True)


def microscaled(shape: tuple[int, ...], mode: Mode, weight: Part, scales: Part) -> Stored:
    """OCP's mxfp4 (codes uint8 [..., in / 2]) or mxfp8 (e4m3 [..., in]); scales e8m0 [..., out, in / 32]."""
    encoding = grouped(mode)
    whole_groups(weight, encoding, shape)
    expect(weight, (*shape[:-1], shape[-1] * encoding.bits // 8), U8, E4M3)
    expect(scales, (*shape[:-1], shape[-1] // encoding.group_size), U8, E8M0)

    def load(start: int, stop: int) -> Encoded:
        words, exponents = viewed(weight.read(start, stop), U32), scales.read(start, stop).view(U8)
        return Encoded(encoding, (stop - start, *shape[1:]), {"weight": words, "scales": exponents})

    return Stored(encoding, shape, (weight, scales), load, "", True)


def fp8(shape: tuple[int, ...], weight: Part, scales: Part, block: int = 0) -> Stored:
    """FP8 with one scale for the tensor ([] or [1]), for each row ([out] or [out, 1]), or for blocks of ``block``.

    A tensor's scale is repeated for its rows, so that every FP8 tensor has one of two forms.
    """
    whole_groups(weight, Encoding("fp8"), shape)
    expect(weight, shape, E4M3)
    expect(scales, None, *FLOATS)
    alone, rows = scales.shape in ((), (1,)), (*shape[:-1], 1)
    encoding = Encoding("fp8", str(scales.dtype))
    if not alone and scales.shape not in (shape[:-1], rows):
        expect(scales, None if block else rows, *FLOATS)
        return plain(Encoding("fp8", str(scales.dtype), block=block), shape, {"weight": weight, "scales": scales})
    each = PerRow(scales, rows)

    def load(start: int, stop: int) -> Encoded:
        parts = {"weight": weight.read(start, stop), "scales": np.ascontiguousarray(each.read(start, stop))}
        return Encoded(encoding, (stop - start, *shape[1:]), parts)

    return Stored(encoding, shape, (weight, scales), load, "fp8 per tensor" if alone else "", True)


def viewed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same bytes as another dtype; a copy only where they lie at an odd address."""
    found = array.view(dtype)
    return found if found.flags.aligned else found.copy()


def _listed(names: Mapping[str, Part] | tuple[str, ...]) -> str:
    return " and ".join(sorted(names))
