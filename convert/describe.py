"""A plan and its result as text: what every tensor becomes, totals by role, what deserves a word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .container import Done
from .edges import Error, Errors
from .plan import Item, Plan
from .text import clock, readable, table

MOST_NAMES = 3


def dry_run(plan: Plan) -> str:
    return "\n".join([*_tensors(plan), "", *_roles(plan), "", *_totals(plan), *remarks(plan), "nothing was written"])


def summary(done: Done) -> str:
    """The end of a conversion: one table, then what deserves a word."""
    lines = [*_roles(done.plan, done.errors), "", *_totals(done.plan)]
    lines.append(
        f"time   {clock(done.seconds)}, {readable(done.plan.source_bytes / done.seconds)} converted per second"
    )
    lines += [f"{'folder' if path.is_dir() else 'file':<6} {path}" for path in done.paths]
    if done.absent:
        lines.append(f"note: neither source nor --sidecars-from has {', '.join(done.absent)}")
    return "\n".join(lines)


def remarks(plan: Plan) -> Iterator[str]:
    """Warnings and notes, each on one line, for the plan as a whole."""
    twice = [*plan.of("requantize"), *(item for item in plan.of("dequantize") if item.encoding.dtype != "float32")]
    if twice:  # bfloat16 rounds too, if less
        yield f"warning: quantized twice, which costs quality: {_some(twice)}; convert from the bfloat16 checkpoint"
    if plan.text_only and plan.target.name == "hf":
        yield "note: transformers cannot do without a vision tower: it makes a random one and says so; text is unharmed"
    notes: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in plan.items:
        if item.note:
            notes[item.format, item.note].append(item)
    for (form, note), items in notes.items():
        yield f"note: {form}, as {note}: {_some(items)}"


def _some(items: list[Item]) -> str:
    names = ", ".join(item.row.name for item in items[:MOST_NAMES])
    more = f" and {len(items) - MOST_NAMES:,} more" if len(items) > MOST_NAMES else ""
    return f"{len(items):,} tensor{'s' if len(items) > 1 else ''}: {names}{more}"


def _tensors(plan: Plan) -> list[str]:
    head = ("tensor", "shape", "from", "to", "", "bytes", "bits")
    rows = [
        (
            item.row.name,
            " x ".join(map(str, item.row.shape)),
            item.stored.format,
            item.format,
            "" if item.edge == "same" else item.edge,
            f"{item.nbytes:,}",
            f"{8 * item.nbytes / item.row.size:.2f}",
        )
        for item in plan.items
    ]
    return table([head, *rows], "<><<<>>")


def _roles(plan: Plan, errors: Errors | None = None) -> list[str]:
    """One line for each role and pair of encodings; the error, where one was measured, is of these tensors alone."""
    roles: dict[str, dict[tuple[str, str], list[Item]]] = {}
    for item in plan.items:
        roles.setdefault(item.row.role, {}).setdefault((item.stored.format, item.format), []).append(item)
    rows = [["role", "tensors", "values", "from", "to", "size", "bits per weight", ""]]
    for role, groups in roles.items():
        for (source, target), items in groups.items():
            values, nbytes = sum(item.row.size for item in items), sum(item.nbytes for item in items)
            bits, error = f"{8 * nbytes / values:.2f}", "" if errors is None else _error(items, errors)
            rows.append([role, f"{len(items):,}", f"{values:,}", source, target, readable(nbytes), bits, error])
    rows[0][-1] = "error" if any(row[-1] for row in rows) else ""
    return table(rows, "<>><<>>>")


def _error(items: list[Item], errors: Errors) -> str:
    """Blank where the plan carries the very numbers; ``exact`` only where every number was compared."""
    if all(item.edge == "same" for item in items):
        return ""
    lost = sum((errors.get(item.row.name, Error()) for item in items), Error())
    exact = not lost.lost and all(item.edge != "quantize" for item in items)
    return "exact" if exact else f"{lost.relative:.2%}"


def _totals(plan: Plan) -> list[str]:
    text = "" if plan.text_only else f", {plan.bits(text=True):.2f} without the vision tower"
    files = f" in {len(plan.shards)} files" if len(plan.shards) > 1 else ""
    return [
        f"from   {plan.checkpoint.format}, {readable(plan.checkpoint.nbytes)}",
        f"to     {plan.target.name}, recipe {plan.recipe.name}: {readable(plan.nbytes)}{files}",
        f"bits   {plan.bits():.2f} per weight{text}",
    ]
