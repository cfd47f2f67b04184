"""What a checkpoint holds, as text: from its config and headers, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.formats import Checkpoint, gguf_model
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import VISION

from . import sidecars
from .manifest import MANIFEST
from .output import JOURNAL
from .text import readable, table
from .writer import INDEX, PART

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
WIDTH = 26
GGUF = gguf_model.GGUF.name


def report(checkpoint: Checkpoint, verified: int | None = None) -> str:
    """Format, coverage by role, sizes of the network, defaults of generation: one item per line.

    ``verified``: how many files are as the manifest has them, or None where nobody looked.
    """
    return "\n".join(_lines(checkpoint, verified))


def _lines(checkpoint: Checkpoint, verified: int | None) -> Iterator[str]:
    values, stored = _values(checkpoint), checkpoint.nbytes
    files = f"{len(checkpoint.files)} file{'s' if len(checkpoint.files) > 1 else ''}"
    place = checkpoint.files[0].parent
    yield _row("folder", place)
    if place != checkpoint.folder:
        yield _row("sidecars", checkpoint.folder)
    yield _row("format", f"{checkpoint.format}, {files}")
    yield _row("total", f"{len(checkpoint.table):,} tensors, {values:,} values, {readable(stored)}")
    yield _row("bits per weight", _bits(checkpoint))
    yield _row("made", _made(checkpoint, verified))
    for note in (*checkpoint.notes, *_odd(checkpoint)):
        yield _row("note", note)
    yield "coverage (every tensor of the model is there, and no other)"
    yield from (f"  {line}" for line in _coverage(checkpoint))
    yield "network"
    yield from _network(checkpoint)
    yield "generation"
    for name, value in vars(checkpoint.generation).items():
        yield _row(f"  {name}", value)


def _row(name: str, value: object) -> str:
    return f"{name:<{WIDTH}}{value}"


def _values(checkpoint: Checkpoint, text: bool = False) -> int:
    return sum(row.size for row in checkpoint.table.values() if not (text and row.role in VISION))


def _bits(checkpoint: Checkpoint) -> str:
    text = [name for name, row in checkpoint.table.items() if row.role not in VISION]
    alone = 8 * sum(checkpoint.tensors[name].nbytes for name in text) / _values(checkpoint, text=True)
    every = 8 * checkpoint.nbytes / _values(checkpoint)
    return f"{every:.2f}" + (f", {alone:.2f} without the vision tower" if len(text) < len(checkpoint.table) else "")


def _made(checkpoint: Checkpoint, verified: int | None) -> str:
    path = checkpoint.files[0].parent / MANIFEST
    if not path.is_file():
        return f"not by this library (no {MANIFEST})"
    data = read_json(path)
    recipe, source = _part(data, "recipe").get("name"), _part(data, "source").get("name")
    state = "not verified; --verify reads every file" if verified is None else f"verified, {verified} files"
    return f"by {data.get('library')} from {source}, recipe {recipe} ({state})"


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _odd(checkpoint: Checkpoint) -> Iterator[str]:
    """What is unusual but no mistake."""
    folder = checkpoint.folder
    missing = sidecars.absent(sidecars.find(folder), checkpoint.config.vision is None)
    if not checkpoint.files[0].exists():
        yield "on the hub: only the headers have been read"
    elif missing:
        yield f"not in the folder: {', '.join(missing)}"
    unfinished = sorted(path.name for path in folder.glob(f"*{PART}"))
    if (folder / JOURNAL).exists() or unfinished:
        yield f"a conversion into this folder was interrupted: {', '.join(unfinished) or JOURNAL}"
    if checkpoint.format == GGUF:  # its projector has no index, and its norms are always float32
        return
    if len(checkpoint.files) > 1 and not (folder / INDEX).is_file():
        yield f"{len(checkpoint.files)} files without an index: all of them are read"
    forms = {stored.encoding.dtype for stored in checkpoint.tensors.values() if not stored.encoding.quantized}
    if len(forms) > 1:
        yield f"dense tensors are of several kinds: {', '.join(sorted(forms))}"


def _coverage(checkpoint: Checkpoint) -> list[str]:
    """One line for each role and number format, in the order of the tensor table."""
    roles: dict[str, dict[str, list[str]]] = {}
    for name, row in checkpoint.table.items():
        roles.setdefault(row.role, {}).setdefault(checkpoint.tensors[name].format, []).append(name)
    rows = [("", "tensors", "values", "format", "size", "bits per weight")]
    for role, forms in roles.items():
        for form, names in forms.items():
            values = sum(checkpoint.table[name].size for name in names)
            size = sum(checkpoint.tensors[name].nbytes for name in names)
            rows.append((role, f"{len(names):,}", f"{values:,}", form, readable(size), f"{8 * size / values:.2f}"))
    return table(rows, "<>><>>")


def _network(checkpoint: Checkpoint) -> Iterator[str]:
    text: TextConfig = checkpoint.config.text
    for name in SIZES:
        yield _row(f"  {name}", f"{getattr(text, name):,}")
    yield _row("  full attention layers", f"{sum(text.full(i) for i in range(text.num_hidden_layers))}")
    yield _row("  canvas_length", checkpoint.config.canvas_length)
    yield _row("  vision", "yes" if checkpoint.config.vision else "no")
