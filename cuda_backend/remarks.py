"""What ``describe()`` says of the weights: the formats they are held in, and what is not as it is on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mlx_diffgemma.backend import TEXT_ONLY, Remarks
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.formats.checkpoint import EMBEDDING
from mlx_diffgemma.formats.encoding import Encoding
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.tensors import VISION

from .linear import fp8_product

FP8_ACTIVATIONS = "activations are rounded to FP8, token by token, where the weights are in FP8 (activations='fp8')"
FP8_HEAD = "logits are made from an FP8 copy of the embedding and hidden states in FP8 (head='fp8')"
UNPACKED = "packed weights are dequantized to {} for every product: slow, but small in memory"


def remarks(
    checkpoint: Checkpoint,
    dtype: str,
    *,
    activations: str | None = None,
    head: str | None = None,
    unpacked: bool = True,
) -> Remarks:
    """Of the text model of ``checkpoint``, computed in ``dtype``; the options are those of ``LoadOptions``.

    ``unpacked``: that packed weights have no kernels.
    """
    text = {name: checkpoint.tensors[name] for name, row in checkpoint.table.items() if row.role not in VISION}
    formats = Counter(_held(name, stored, dtype) for name, stored in text.items())
    matrices = [stored for stored in text.values() if len(stored.shape) > 1]
    if activations:  # then those in FP8 are multiplied as they are
        matrices = [stored for stored in matrices if not fp8_product(stored.encoding, stored.shape)]
    rounded = {stored.format: stored.quantized for stored in matrices if not _exact(stored.encoding, dtype)}
    coarse = ", ".join(sorted(name for name, quantized in rounded.items() if quantized))
    approximations = [f"dequantized weights ({coarse}) are rounded to {dtype}"] if coarse else []
    approximations += [FP8_ACTIVATIONS] if activations else []
    approximations += [FP8_HEAD] if head else []
    dense = sorted(name for name, quantized in rounded.items() if not quantized)
    notes = [f"{name} weights are rounded to {dtype}; dtype='float32' keeps them" for name in dense]
    return Remarks(dict(formats), tuple(approximations), (*notes, *_notes(checkpoint, text, dtype, unpacked)))


def _packed(name: str, stored: Stored) -> bool:
    return stored.encoding.quantized and len(stored.shape) > 1 and name != EMBEDDING


def _held(name: str, stored: Stored, dtype: str) -> str:
    return stored.format if _packed(name, stored) or not stored.quantized else f"{dtype} from {stored.format}"


def _exact(encoding: Encoding, dtype: str) -> bool:
    """Whether every value is a number of ``dtype``. Short codes times short scales are; 2^k has no digits at all."""
    if dtype == "float32" or encoding.mode in ("mxfp4", "mxfp8"):
        return True
    if encoding.mode == "nvfp4":
        return not encoding.global_scale
    return encoding.mode == "dense" and encoding.dtype == dtype


def _notes(checkpoint: Checkpoint, text: dict[str, Stored], dtype: str, unpacked: bool) -> Iterator[str]:
    if text[EMBEDDING].quantized:
        yield f"the embedding ({text[EMBEDDING].format}) is dequantized at load and held in {dtype}"
    if unpacked and any(_packed(name, stored) for name, stored in text.items()):
        yield UNPACKED.format(dtype)
    if checkpoint.config.vision:
        yield TEXT_ONLY
