"""What a conversion will do, before it does anything: every tensor's new encoding, what that costs, and its file.

``choose`` settles the encodings from the tensor table alone, so that sizes are known for a model that is not here;
``make`` adds where the tensors come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.formats.encoding import Encoding, dense
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.tensors import VISION, Tensor

from .edges import Edge, edge
from .recipes import Recipe, layer_of
from .target import Output, Target

SHARD = 5_000_000_000  # bytes
SMALLEST_GROUP = 32


def size(output: Output) -> int:
    """Bytes in the file."""
    return math.prod(output.shape) * output.dtype.itemsize


@dataclass(frozen=True)
class Choice:
    """An encoding, and why it is not the one that the recipe asks for."""

    encoding: Encoding
    note: str = ""


@dataclass(frozen=True)
class Item:
    """One row of the tensor table on its way."""

    row: Tensor
    stored: Stored
    encoding: Encoding
    format: str  # what the file calls the encoding
    edge: Edge
    outputs: tuple[Output, ...]
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(size(output) for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One file to be."""

    name: str
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


@dataclass(frozen=True)
class Plan:
    checkpoint: Checkpoint
    target: Target
    recipe: Recipe
    items: tuple[Item, ...]
    shards: tuple[Shard, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(item.stored.nbytes for item in self.items)

    @property
    def values(self) -> int:
        return sum(item.row.size for item in self.items)

    @property
    def encodings(self) -> dict[str, Encoding]:
        return {item.row.name: item.encoding for item in self.items}

    @property
    def text_only(self) -> bool:
        return not any(item.row.role in VISION for item in self.items)

    def bits(self, text: bool = False) -> float:
        """Bits per weight, of the text model alone if ``text``."""
        items = [item for item in self.items if not (text and item.row.role in VISION)]
        return 8 * sum(item.nbytes for item in items) / sum(item.row.size for item in items)

    def of(self, kind: Edge) -> list[Item]:
        return [item for item in self.items if item.edge == kind]


def make(
    checkpoint: Checkpoint, target: Target, recipe: Recipe, *, text_only: bool = False, shard_size: int | None = None
) -> Plan:
    """The plan for a checkpoint.

    Raises:
        OptionError: a recipe that asks for what the target cannot hold, or names what the model has not.
    """
    table = {n: row for n, row in checkpoint.table.items() if not (text_only and row.role in VISION)}
    choices = choose(table, target, recipe, checkpoint.tensors)
    items = []
    for name, row in table.items():
        stored, choice = checkpoint.tensors[name], choices[name]
        outputs = tuple(target.outputs(row, choice.encoding))
        form = target.names.get(str(choice.encoding), str(choice.encoding))
        way = edge(stored, choice.encoding, form)
        items.append(Item(row, stored, choice.encoding, form, way, outputs, choice.note))
    return Plan(checkpoint, target, recipe, tuple(items), tuple(shards(items, shard_size or SHARD)))


def choose(
    table: Mapping[str, Tensor], target: Target, recipe: Recipe, stored: Mapping[str, Stored] | None = None
) -> dict[str, Choice]:
    """The encoding of every row. ``stored`` is needed only where the recipe keeps what there is.

    Raises:
        OptionError: as ``make``.
    """
    layers = 1 + max((layer for row in table.values() if (layer := layer_of(row)) is not None), default=0)
    _check_overrides(table.values(), recipe, layers)
    found: dict[str, Choice] = {}
    refused: dict[tuple[str, Encoding], bool] = {}  # whether no matrix of the role can be written as asked
    for name, row in table.items():
        wanted = recipe.wanted(row, layers)
        if wanted is None:
            assert stored is not None, "keeping numbers needs to know them"
            found[name] = _kept(row, target, stored[name])
            continue
        found[name] = _fitted(row, target, wanted)
        if wanted.quantized and len(row.shape) > 1:
            key = (row.role, wanted)
            refused[key] = refused.get(key, True) and not found[name].encoding.quantized
    for (role, wanted), none in refused.items():
        if none and not any(target.holds(_ideal(row), wanted) for row in table.values() if row.role == role):
            raise OptionError(
                f"recipe {recipe.name!r} asks for {wanted} ({role}), which {target.name!r} cannot hold; "
                "choose another recipe or another format with --to"
            )
    return found


def _ideal(row: Tensor) -> Tensor:
    """The row with sizes that every group divides: can the target hold such a thing at all?"""
    return replace(row, shape=tuple(4096 for _ in row.shape))


def _fitted(row: Tensor, target: Target, wanted: Encoding) -> Choice:
    """The recipe's encoding, in smaller groups if it must be, else bfloat16."""
    if not wanted.quantized:
        return Choice(_dense(row, target, wanted))
    if len(row.shape) < 2:
        return Choice(_dense(row, target))
    for encoding in _smaller_groups(wanted):
        if encoding.fits(row.shape) and target.holds(row, encoding):
            if encoding == wanted:
                return Choice(encoding)
            whole = f"{target.name} has no groups of {wanted.group_size}"
            return Choice(encoding, whole if wanted.fits(row.shape) else _uneven(row, wanted))
    if target.holds(_ideal(row), wanted):
        return Choice(_dense(row, target), f"rows of {row.shape[-1]} fit no group of {wanted.mode}")
    return Choice(_dense(row, target), f"{target.name} keeps it dense")


def _dense(row: Tensor, target: Target, wanted: Encoding = dense()) -> Encoding:  # noqa: B008
    """``wanted``, or float32 for the rows that the target has in nothing else."""
    return wanted if target.holds(row, wanted) else dense("float32")


def _uneven(row: Tensor, wanted: Encoding) -> str:
    return f"rows of {row.shape[-1]} do not divide by {wanted.group_size}"


def _smaller_groups(wanted: Encoding) -> Iterable[Encoding]:
    yield wanted
    size = wanted.group_size
    while wanted.mode == "affine" and size > SMALLEST_GROUP:
        size //= 2
        yield replace(wanted, group_size=size)


def _kept(row: Tensor, target: Target, stored: Stored) -> Choice:
    """The stored numbers, in another form that holds them if need be; where there is none, bfloat16."""
    given = stored.encoding
    forms = [given]
    if given.mode == "nvfp4":
        forms.append(replace(given, global_scale=True))
    if given.mode in ("dense", "affine", "fp8"):
        forms.append(replace(given, dtype="float32"))
    for form in forms:
        if target.holds(row, form):
            larger = stored.quantized and not form.quantized
            return Choice(form, f"{target.name} has no {stored.format}; a --recipe makes it smaller" if larger else "")
    return Choice(_dense(row, target), f"{target.name} cannot hold {stored.format}")


def _check_overrides(rows: Iterable[Tensor], recipe: Recipe, layers: int) -> None:
    rows = list(rows)
    for number, override in enumerate(recipe.overrides, 1):
        beyond = [layer for layer in override.layers if not -layers <= layer < layers]
        if beyond:
            raise OptionError(f"recipe {recipe.name!r}, override {number}: layer {beyond[0]} of {layers}")
        if not any(override.meets(row, layers) for row in rows):
            raise OptionError(f"recipe {recipe.name!r}, override {number} meets no tensor of this model")


def shards(items: Iterable[Item], most: int = SHARD) -> list[Shard]:
    """Files of at most ``most`` bytes, in the order of the table; a tensor larger than that has one to itself."""
    groups: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if groups[-1] and held + item.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += item.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]
