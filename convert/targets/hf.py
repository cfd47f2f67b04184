"""The layout of the published checkpoint: canonical names, dense numbers, config.json in Google's dialect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlx_diffgemma.formats.encoding import Encoded, Encoding
from mlx_diffgemma.tensors import Tensor

from ..dialect import googles, norm_dtype
from ..target import Output


class HuggingFace:
    name: str = "hf"
    metadata: Mapping[str, str] = {"format": "pt"}
    names: Mapping[str, str] = {}

    def holds(self, row: Tensor, encoding: Encoding) -> bool:
        return not encoding.quantized

    def outputs(self, row: Tensor, encoding: Encoding) -> list[Output]:
        return [Output(row.name, *encoding.parts(row.shape)["weight"])]

    def emit(self, row: Tensor, start: int, encoded: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
        yield row.name, start, encoded.parts["weight"]

    def config(self, config: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
        return googles(config, norm_dtype(encodings))
