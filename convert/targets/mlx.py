"""MLX checkpoints in mlx-vlm's layout: banks of experts get a ``.weight``, config.json lists how modules are quantized.

``quantization`` says bits, group size and mode of most modules and lists the others, always with their mode: without
one, readers disagree about what is meant. ``quantization_config`` is the same block, for readers of that name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlx_diffgemma.formats.assemble import module_name
from mlx_diffgemma.formats.encoding import Encoded, Encoding
from mlx_diffgemma.formats.mlx import BITS, GLOBAL, SIZES
from mlx_diffgemma.tensors import Tensor

from ..dialect import googles, norm_dtype
from ..target import Output

PARTS = {"global_scale": GLOBAL}  # where the file's name of a part is not ours


class MLX:
    name: str = "mlx"
    metadata: Mapping[str, str] = {"format": "mlx"}
    names: Mapping[str, str] = {}

    def holds(self, row: Tensor, encoding: Encoding) -> bool:
        if not encoding.quantized:
            return True
        if not _module(row) or encoding.mode == "fp8" or not encoding.fits(row.shape):
            return False
        if encoding.mode == "affine":
            return encoding.bits in BITS and encoding.group_size in SIZES
        return not encoding.global_scale or row.role != "embedding"  # mlx-vlm's embeddings have no place for it

    def outputs(self, row: Tensor, encoding: Encoding) -> list[Output]:
        return [Output(_name(row, part, encoding), *what) for part, what in encoding.parts(row.shape).items()]

    def emit(self, row: Tensor, start: int, encoded: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
        for part, array in encoded.parts.items():
            yield _name(row, part, encoded.encoding), start, array

    def config(self, config: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
        found = googles(config, norm_dtype(encodings))
        modules = {module_name(name): encoding for name, encoding in encodings.items() if encoding.quantized}
        if modules:
            block = _quantization(modules)
            found |= {"quantization": block, "quantization_config": block}
        return found


def _module(row: Tensor) -> bool:
    """Whether the row is the weight of a linear layer, an embedding or a bank of them; MLX quantizes nothing else."""
    return row.role == "experts" or (len(row.shape) == 2 and row.name.endswith(".weight"))


def _name(row: Tensor, part: str, encoding: Encoding) -> str:
    if not encoding.quantized and row.role != "experts":
        return row.name
    return f"{module_name(row.name)}.{PARTS.get(part, part)}"


def _quantization(modules: Mapping[str, Encoding]) -> dict[str, Any]:
    """The standard is what most of the modules with the fewest bits have: a four-bit model is called one."""
    rows = {module: _row(encoding) for module, encoding in modules.items()}
    fewest = min(row["bits"] for row in rows.values())
    kinds = Counter(tuple(row.items()) for row in rows.values() if row["bits"] == fewest)
    standard = dict(kinds.most_common(1)[0][0])
    return standard | {module: row for module, row in rows.items() if row != standard}


def _row(encoding: Encoding) -> dict[str, Any]:
    return {"group_size": encoding.group_size, "bits": encoding.bits, "mode": encoding.mode}
