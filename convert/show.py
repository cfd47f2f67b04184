"""What a checkpoint holds, as text: from its config and headers, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.formats import Checkpoint

from .text import readable

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "top_k_experts",
    "sliding_window",
    "max_position_embeddings",
)


@dataclass
class Share:
    """What one role, or one dtype, has of the checkpoint."""

    tensors: int = 0
    values: int = 0
    bytes: int = 0

    def add(self, values: int, size: int) -> None:
        self.tensors, self.values, self.bytes = self.tensors + 1, self.values + values, self.bytes + size

    def __str__(self) -> str:
        return f"{self.tensors:>7,} tensors {self.values:>16,} values {readable(self.bytes):>10}"


def report(checkpoint: Checkpoint) -> str:
    """Format, dtypes, coverage by role, sizes of the network, defaults of generation: one item per line."""
    return "\n".join(_lines(checkpoint))


def _lines(checkpoint: Checkpoint) -> Iterator[str]:
    roles, formats = _shares(checkpoint)
    total = Share(*(sum(getattr(share, f.name) for share in roles.values()) for f in fields(Share)))
    yield _row("folder", checkpoint.folder)
    yield _row("format", f"{checkpoint.format}, files: {len(checkpoint.files)}")
    yield _row("total", total)
    for name, share in formats.items():
        yield _row(f"  {name}", share)
    for note in checkpoint.notes:
        yield _row("note", note)
    yield "coverage (every tensor of the model is there, and no other)"
    for role, share in roles.items():
        yield _row(f"  {role}", share)
    yield "network"
    yield from _network(checkpoint)
    yield "generation"
    for field in fields(checkpoint.generation):
        yield _row(f"  {field.name}", getattr(checkpoint.generation, field.name))


def _row(name: str, value: object) -> str:
    return f"{name:<26}{value}"


def _shares(checkpoint: Checkpoint) -> tuple[dict[str, Share], dict[str, Share]]:
    """By role and by number format, in the order of the tensor table."""
    roles: dict[str, Share] = {}
    formats: dict[str, Share] = {}
    for name, row in checkpoint.table.items():
        stored = checkpoint.tensors[name]
        for shares, key in ((roles, str(row.role)), (formats, stored.format)):
            shares.setdefault(key, Share()).add(row.size, stored.nbytes)
    return roles, formats


def _network(checkpoint: Checkpoint) -> Iterator[str]:
    text: TextConfig = checkpoint.config.text
    for name in SIZES:
        yield _row(f"  {name}", f"{getattr(text, name):,}")
    yield _row("  full attention layers", f"{sum(text.full(i) for i in range(text.num_hidden_layers))}")
    yield _row("  canvas_length", checkpoint.config.canvas_length)
    yield _row("  vision", "yes" if checkpoint.config.vision else "no")
