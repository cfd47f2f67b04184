"""From the names in the files to the rows of the tensor table.

A *module* is a tensor's name without its part: ``….q_proj`` has the parts ``weight``, ``scales`` and so on, and a name
that ends in no part is its own module with the one part ``weight``. What differs between formats, the ``Dialect``, is
which parts there are and what they mean. Common to all: tied tensors may stand under either name, banks of experts may
be cut into one module per expert or into gate and up, and every tensor must be accounted for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..errors import CheckpointError
from ..tensors import Tensor
from .stored import Part, Stored, joined, stacked

Parts = dict[str, Part]
EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9][0-9]{0,5}|switch_glu|switch_mlp)\.(gate|up|down)_proj")
AT_ONCE = 1 << 24  # bytes of a tie that is stored twice, compared at a time


class Dialect(Protocol):
    """What a checkpoint format makes of the parts of a module."""

    @property
    def name(self) -> str: ...  # for people

    @property
    def suffixes(self) -> frozenset[str]: ...  # the parts a module may have; "_x" is glued on: ….gate_up_proj_x

    @property
    def partial(self) -> bool: ...  # whether the vision tower may be left out, as text-only conversions do

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        """One module of the logical ``shape``. ``parts`` are checked here; their names are the file's own.

        Raises:
            CheckpointError: a part that is missing, misshapen or of another dtype.
        """
        ...

    def ignored(self, name: str) -> bool:
        """Whether a tensor that the model has no place for is known to be harmless."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a module belongs: a row, which of its names was used (0 = its own), and for experts which piece.

    ``expert`` is -1 for a bank of all; ``half`` is 0 for gate and down, 1 for up.
    """

    row: str
    alias: int = 0
    expert: int = -1
    half: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Assembled:
    tensors: dict[str, Stored]
    missing: list[str]
    unknown: list[str]  # names in the files
    unused: list[str]  # names in the files that the dialect knows to be harmless


def assemble(parts: Iterable[Part], table: dict[str, Tensor], dialect: Dialect) -> Assembled:
    """Every row of ``table`` from ``parts``; nothing is read, but ties that are stored twice are compared.

    Raises:
        CheckpointError: a tensor stored twice, tied ones that differ, or whatever the dialect finds wrong.
    """
    places, seen = _places(table), dict[str, Part]()
    modules: dict[str, dict[Place, Parts]] = defaultdict(lambda: defaultdict(dict))
    unknown: list[str] = []
    unused: list[str] = []
    for part in parts:
        if part.name in seen:
            first = seen[part.name].path.name
            raise CheckpointError(f"{part.name} is stored twice, in {first} and {part.path.name}")
        seen[part.name] = part
        module, kind = _split(part.name, places, dialect)
        place = _place(module, places)
        if place:
            other = modules[place.row][place].setdefault(kind, part)
            if other is not part:
                raise CheckpointError(f"{part.path}: {part.name} is {other.name} by another name, stored twice")
        else:
            (unused if dialect.ignored(part.name) else unknown).append(part.name)
    tensors = {name: _tensor(row, modules[name], dialect) for name, row in table.items() if name in modules}
    return Assembled(tensors, sorted(set(table) - set(tensors)), sorted(unknown), sorted(unused))


def module_name(name: str) -> str:
    """Of a canonical tensor: ``….q_proj.weight`` is the weight of ``….q_proj``."""
    return name.removesuffix(".weight")


def _places(table: dict[str, Tensor]) -> dict[str, Place]:
    """All names a module may have, but those of single experts."""
    found = {}
    for row in table.values():
        for alias, name in enumerate((row.name, *row.ties)):
            found[module_name(name)] = Place(row.name, alias)
    return found


def _split(name: str, places: dict[str, Place], dialect: Dialect) -> tuple[str, str]:
    if name in places:
        return name, "weight"
    module, _, kind = name.rpartition(".")
    if kind in dialect.suffixes:
        return module, kind
    glued = next((end for end in dialect.suffixes if end.startswith("_") and name.endswith(end)), "")
    return name.removesuffix(glued), f"weight{glued}"


def _place(module: str, places: dict[str, Place]) -> Place | None:
    if module in places:
        return places[module]
    match = EXPERT.fullmatch(module)
    if not match:
        return None
    experts, which, matrix = match.groups()
    bank = places.get(f"{experts}.{'down_proj' if matrix == 'down' else 'gate_up_proj'}")
    expert = int(which) if which.isdigit() else -1
    return bank and Place(bank.row, bank.alias, expert, int(matrix == "up"), False)


def _tensor(row: Tensor, modules: dict[Place, Parts], dialect: Dialect) -> Stored:
    """The row from its modules, under the first of its names; another name must hold the same."""
    aliases = sorted({place.alias for place in modules})
    kept = {place: parts for place, parts in modules.items() if place.alias == aliases[0]}
    for place, parts in modules.items():
        if place.alias != aliases[0]:
            _same(kept.get(Place(row.name, aliases[0], place.expert, place.half, place.whole), {}), parts)
    if any(place.whole for place in kept):
        if len(kept) > 1:
            raise CheckpointError(f"{row.name} is stored whole and in pieces; which one is meant?")
        return dialect.stored(row.shape, next(iter(kept.values())))
    return _bank(row, kept, dialect)


def _same(kept: Parts, twin: Parts) -> None:
    for kind, part in twin.items():
        other = kept.get(kind)
        if other is None or not _equal(other, part):
            name = other.name if other else "its twin"
            raise CheckpointError(f"{part.path}: {part.name} differs from {name}, yet the model shares them")


def _equal(one: Part, other: Part) -> bool:
    """Whether two arrays are the same bits, some rows at a time: an embedding has 1.5 GB."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if 0 in one.shape:
        return True
    rows = one.shape[0] if one.shape else 1
    step = max(1, AT_ONCE * rows // max(1, one.nbytes))
    ranges = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all(one.read(*span).tobytes() == other.read(*span).tobytes() for span in ranges)


def _bank(row: Tensor, modules: dict[Place, Parts], dialect: Dialect) -> Stored:
    """A bank [E, ...] from one module per expert, or from gate and up for all experts."""
    experts, rows, *rest = row.shape
    halves = 2 if row.name.endswith("gate_up_proj") else 1
    whole = any(place.expert < 0 for place in modules)
    numbers = range(-1, 0) if whole else range(experts)
    alias = next(iter(modules)).alias
    places = (Place(row.name, alias, expert, half, False) for expert in numbers for half in range(halves))
    lacking = next((place for place in places if place not in modules), None)  # before any list: counts may be absurd
    if lacking or len(modules) != halves * len(numbers):
        of = "gate or up" if whole else f"expert {lacking.expert}" if lacking else ""
        path = next(part.path for parts in modules.values() for part in parts.values())
        what = f"lacks {of}" if lacking else f"has more than {experts} experts"
        raise CheckpointError(f"{path}: {row.name} {what}; download it again")
    size = (rows // halves, *rest)
    shape = (experts, *size) if whole else size
    pieces = [
        [dialect.stored(shape, modules[Place(row.name, alias, expert, half, False)]) for half in range(halves)]
        for expert in numbers
    ]
    if whole:
        return joined(pieces[0], 1)
    return stacked([joined(halves, 0) if len(halves) > 1 else halves[0] for halves in pieces])
