"""The Hugging Face layout: names are canonical, every tensor is dense."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError
from .assemble import Parts
from .encoding import DTYPES, dense
from .stored import Part, Stored, plain


@dataclass(frozen=True)
class HuggingFace:
    name: str = "Hugging Face"
    suffixes: frozenset[str] = frozenset({"weight"})
    partial: bool = False

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        return dense_part(shape, parts["weight"])

    def ignored(self, name: str) -> bool:
        return False


def dense_part(shape: tuple[int, ...], part: Part) -> Stored:
    """A dense tensor, as every format has them for norms and scalars.

    Raises:
        CheckpointError: another shape, or numbers that are no weights.
    """
    if str(part.dtype) not in DTYPES:
        raise CheckpointError(
            f"{part.path}: {part.name} is {part.dtype}, expected {', '.join(DTYPES)}; "
            "if it is quantized, its config.json does not say how"
        )
    return plain(dense(str(part.dtype)), shape, {"weight": part})
