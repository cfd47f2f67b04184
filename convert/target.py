"""What a format to write in must say of itself: which numbers it holds, how its tensors are called, its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_diffgemma.formats.encoding import Encoded, Encoding
from mlx_diffgemma.tensors import Tensor


@dataclass(frozen=True)
class Output:
    """One tensor of a file to be."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Target(Protocol):
    """A format of safetensors files. Rows are those of the tensor table, encodings what is to be written."""

    name: str
    metadata: Mapping[str, str]  # of every file
    names: Mapping[str, str]  # of encodings that the format calls something else

    def holds(self, row: Tensor, encoding: Encoding) -> bool:
        """Whether this row can be written so. Every target holds float32."""
        ...

    def outputs(self, row: Tensor, encoding: Encoding) -> list[Output]:
        """The file's tensors for one row, in the order in which they lie."""
        ...

    def emit(self, row: Tensor, start: int, encoded: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
        """Rows ``start`` and after of the first axis as (output name, first row in that output, array)."""
        ...

    def config(self, config: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
        """The new config.json from the source's, in Google's dialect, for the encodings by row name."""
        ...
