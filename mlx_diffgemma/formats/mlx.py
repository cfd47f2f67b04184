"""MLX checkpoints, as mlx-vlm writes them and mlx-community publishes them.

Names are Hugging Face's, but banks of experts get a ``.weight``; a quantized module has ``scales`` beside it, and
``biases`` in the affine mode. config.json says how, in ``quantization``: bits, group size and mode for all, and
exceptions by module. **An exception without a mode is affine**, whatever the mode for all is (mlx-vlm 0.7.10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import CheckpointError, ConfigError
from .assemble import Parts
from .encoding import DTYPES, GROUPS, WIDTHS, Encoding, Mode, grouped
from .hf import dense_part
from .stored import Part, Stored, plain

BITS, SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
DEFAULTS = {"bits": 4, "group_size": 64}  # MLX's own, of an exception that does not say
GLOBAL = "weight_scale_2"  # mlx-vlm's name for ModelOpt's second scale of nvfp4
PROJECTOR = "model.encoder.embed_vision."


@dataclass(frozen=True)
class MLX:
    """``standard`` is the encoding of every quantized module but the ``exceptions``, by the file's names.

    An exception is ``false`` or an object, looked at only where a module is quantized: some tools list what they
    skipped, and keep other settings beside the modules.
    """

    standard: Encoding | None = None
    exceptions: Mapping[str, Any] = field(default_factory=dict)
    name: str = "MLX"
    suffixes: frozenset[str] = frozenset({"weight", "scales", "biases", GLOBAL})
    partial: bool = True

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        weight = parts.get("weight")
        if weight is None:
            part = next(iter(parts.values()))
            raise CheckpointError(f"{part.path} has {part.name} but not its weight; download it again")
        if set(parts) == {"weight"}:
            return dense_part(shape, weight)
        module = weight.name.removesuffix(".weight")
        encoding = self._encoding(module, parts)
        wanted = dict(parts)
        if GLOBAL in wanted:
            wanted["global_scale"] = PerRow(wanted.pop(GLOBAL), shape[:-1])
        lacking = set(encoding.parts(shape)) ^ set(wanted)
        if lacking:
            some = sorted(lacking)[0]
            raise CheckpointError(
                f"{weight.path}: {module} {'lacks' if some in encoding.parts(shape) else 'has'} {some}, "
                f"yet config.json says {encoding}"
            )
        if not encoding.fits(shape):
            raise CheckpointError(
                f"{weight.path}: {module} has rows of {shape[-1]} in {encoding}, not whole groups of "
                f"{encoding.group_size}; config.json does not match the weights"
            )
        return plain(encoding, shape, wanted)

    def ignored(self, name: str) -> bool:
        return name.startswith(PROJECTOR)  # text-only conversions forget it there

    def _encoding(self, module: str, parts: Parts) -> Encoding:
        encoding, row = self.standard, self.exceptions.get(module)
        if row is not None:
            encoding = _encoding(f"quantization[{module!r:.80}]", row, DEFAULTS) if row else None
        if encoding is None:
            part = parts.get("scales") or next(iter(parts.values()))
            raise CheckpointError(
                f"{part.path}: {part.name} says that {module} is quantized, config.json says nothing of it; "
                "convert it again from its source"
            )
        if encoding.mode != "affine":
            return replace(encoding, global_scale=GLOBAL in parts)
        scales = parts.get("scales")
        if scales is None or str(scales.dtype) not in DTYPES:
            return encoding  # ``plain`` names what is wrong
        return replace(encoding, dtype=str(scales.dtype))


@dataclass(frozen=True)
class PerRow:
    """A global scale that the file holds once, or once per expert, as one float32 per row."""

    part: Part
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        have = self.part.shape
        if have not in ((), (1,)) and have != self.shape[: len(have)]:
            raise CheckpointError(f"{self.path}: {self.name} has shape {have}, expected {self.shape} or fewer axes")

    @property
    def path(self) -> Path:
        return self.part.path

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def dtype(self) -> np.dtype:
        return self.part.dtype

    @property
    def nbytes(self) -> int:
        return self.part.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        shape = (len(range(self.shape[0])[start:stop]), *self.shape[1:])
        if self.part.shape in ((), (1,)):
            return np.broadcast_to(self.part.read().reshape(()), shape)
        rows = self.part.read(start, stop)
        return np.broadcast_to(rows.reshape(*rows.shape, *(1,) * (len(shape) - rows.ndim)), shape)


def dialect(config: Mapping[str, Any]) -> MLX:
    """The dialect of one config.json.

    Raises:
        ConfigError: a mode, bit width or group size that MLX has not.
    """
    given = config.get("quantization") or config.get("quantization_config")
    if not given:
        return MLX()
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: quantization is {given!r:.80}, expected an object")
    exceptions = {module: row for module, row in given.items() if row is False or isinstance(row, Mapping)}
    return MLX(_encoding("quantization", given, {}), exceptions)


def _encoding(where: str, row: Mapping[str, Any], affine: Mapping[str, int]) -> Encoding:
    """``affine`` has what that mode's bits and group size are where they are left out."""
    mode: Any = row.get("mode", "affine")
    if not isinstance(mode, str) or mode not in ("affine", *GROUPS):
        raise ConfigError(f"config.json: {where}.mode is {mode!r:.80}; known are affine, {', '.join(GROUPS)}")
    known = affine if mode == "affine" else {}
    bits, group_size = (row.get(name, known.get(name)) for name in ("bits", "group_size"))
    if mode == "affine":
        fine = type(bits) is int and bits in BITS and type(group_size) is int and group_size in SIZES
    else:  # which have one width and one group size, and need not say so
        fine = bits in (None, WIDTHS[mode]) and group_size in (None, GROUPS[mode])
    if not fine:
        raise ConfigError(f"config.json: {where} has bits={bits!r:.40} and group_size={group_size!r:.40} in {mode}")
    return grouped(cast(Mode, mode), bits=bits or 0, group_size=group_size or 0)
