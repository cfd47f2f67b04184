"""The formats to write in, by the name that ``--to`` takes.

A target says what its files look like (``convert.target``); ``convert.writer`` writes them, streaming. A format that is
not made of safetensors files brings a writer of its own in ``CONTAINERS``.
"""

from __future__ import annotations

from mlx_diffgemma.errors import OptionError

from ..container import Container
from ..gguf_target import GGUF
from ..target import Target
from .compressed_tensors import CompressedTensors
from .hf import HuggingFace
from .mlx import MLX

TARGETS: dict[str, Target] = {target.name: target for target in (MLX(), HuggingFace(), CompressedTensors(), GGUF())}
CONTAINERS: dict[str, Container] = {GGUF.name: GGUF()}


def target(name: str) -> Target:
    """A target by name.

    Raises:
        OptionError: there is no such format.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown format {name!r} to convert to; known are {', '.join(TARGETS)}")
    return TARGETS[name]
