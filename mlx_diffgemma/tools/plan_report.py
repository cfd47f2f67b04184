"""``--plan`` for people: one table of the work of a step, one of memory. Plain text of a given width.

Where the width is short, columns are left out; no figure is ever cut.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from .chips import CHIPS, GIGA

GAP = 2
HEADS = (
    "part",
    "plain\n{moved}",
    "kernels\n{moved}",
    "saved",
    "{work}",
    "plain\nfloor {time}",
    "kernels\nfloor {time}",
)
SPARED = (3, 4, 5, 1)  # columns of the work of a step that may go, the first one first


def text(plan: dict[str, Any], width: int) -> str:
    """All of it; lines end without blanks."""
    parts = [
        *(line for sentence in heading(plan) for line in folded(sentence, width)),
        "",
        *work_table(plan).lines(width),
        "",
        *(line for remark in remarks(plan) for line in folded(remark, width)),
        "",
        *memory_table(plan).lines(width),
        "",
        *(line for remark in memory_remarks(plan) for line in folded(remark, width)),
    ]
    return "\n".join(parts)


def folded(sentence: str, width: int) -> list[str]:
    return textwrap.wrap(sentence, width, break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class Table:
    """``heads`` may have two lines. The last ``below`` rows are ruled off; ``left``: columns that start at the left."""

    heads: tuple[str, ...]
    rows: list[list[str]]
    below: int
    spared: tuple[int, ...] = ()
    left: tuple[int, ...] = (0,)

    def lines(self, width: int) -> list[str]:
        """With as many of the ``spared`` columns as ``width`` has room for."""
        sizes = [
            max(map(len, (*head.split("\n"), *cells))) for head, *cells in zip(self.heads, *self.rows, strict=True)
        ]
        shown = [*range(len(sizes))]
        for column in self.spared:
            if sum(sizes[i] + GAP for i in shown) - GAP > width:
                shown.remove(column)

        def line(cells: list[str]) -> str:
            found = (cells[i].ljust(sizes[i]) if i in self.left else cells[i].rjust(sizes[i]) for i in shown)
            return (" " * GAP).join(found).rstrip()

        high = max(head.count("\n") for head in self.heads)
        heads = [("\n" * (high - head.count("\n")) + head).split("\n") for head in self.heads]
        rule = "─" * (sum(sizes[i] + GAP for i in shown) - GAP)
        body = [line(row) for row in self.rows]
        above = len(body) - self.below
        return [*(line([head[i] for head in heads]) for i in range(high + 1)), rule, *body[:above], rule, *body[above:]]


# ---- the work of a step


def heading(plan: dict[str, Any]) -> list[str]:
    chip, batch = plan["chip"], plan["batch"]
    rows = f", batch {batch:,}" if batch > 1 else ""
    head = f", head over {plan['head_positions']} positions" if plan["head_positions"] < plan["canvas_length"] else ""
    return [
        f"{plan['model']}, {plan['format']}: one denoising step of {plan['canvas_length']:,} tokens behind "
        f"{plan['prompt_tokens']:,}{rows}{head}",
        f"{chip['name']}: {chip['bandwidth']:,g} GB/s, {chip['cores']} GPU cores, {chip['tflops']:.1f} TFLOP/s float16 "
        "at most. Counted from shapes; nothing here was measured.",
    ]


def scale(amount: float) -> tuple[float, str]:
    """A unit in which a total of ``amount`` reads well: what it is divided by, and its prefix."""
    return next(((size, sign) for size, sign in ((1e9, "G"), (1e6, "M")) if amount >= size), (1e3, "k"))


def work_table(plan: dict[str, Any]) -> Table:
    total = plan["total"]
    size, operation = scale(total["fused"]["bytes"]), scale(total["fused"]["operations"])
    time = (1.0, "ms") if total["fused"]["milliseconds"] >= 1 else (1e-3, "µs")
    units = {"moved": f"{size[1]}B", "work": f"{operation[1]}FLOP", "time": time[1]}
    rows = [cells(part, size[0], operation[0], time[0]) for part in (*plan["parts"], total)]
    return Table(tuple(head.format(**units) for head in HEADS), rows, 1, SPARED)


def cells(part: dict[str, Any], size: float, operation: float, time: float) -> list[str]:
    sides = part["plain"], part["fused"]
    saved = f"{part['saved']:.0%}" if part["saved"] > 0.005 else ""
    moved, floors = (
        [f"{side[name] / unit:,.2f}" for side in sides] for name, unit in (("bytes", size), ("milliseconds", time))
    )
    return [part["part"], *moved, saved, f"{part['fused']['operations'] / operation:,.0f}", *floors]


def remarks(plan: dict[str, Any]) -> list[str]:
    target, prefix, total = plan["vocabulary_and_attention"], plan["prefix"], plan["total"]
    size, sign = scale(target["fused"])
    lines = [
        f"vocabulary + attention traffic: {target['plain'] / size:,.2f} {sign}B plain, {target['fused'] / size:,.2f} "
        f"{sign}B with kernels: {target['less']:.0%} less (goal: at least 35%). If plain operations took slices as "
        f"large: {target['less_at_equal_slices']:.0%}; where attention stays plain: "
        f"{target['less_with_plain_attention']:.0%}; with both: {target['less_with_both']:.0%}",
        f"copies of the prefix per step: {prefix['copied']} bytes (joining prefix and canvas in every layer would move "
        f"{prefix['joining_would_move'] / size:,.2f} {sign}B)",
        "floor: the larger of bytes / bandwidth and operations / rate, part by part; products are MLX's either way",
    ]
    plain, fused = total["plain"]["operations"], total["fused"]["operations"]
    if plain != fused:
        unit, prefixed = scale(fused)
        lines.append(f"{prefixed}FLOP: with kernels; plain operations multiply {plain / unit:,.0f}")
    if plan["survivors"] is not None:
        lines.append(f"survivors: {plan['survivors']:,.10g} per row are assumed; a flat row costs what dense does")
    return lines


# ---- memory


def memory_table(plan: dict[str, Any]) -> Table:
    held = plan["memory"]
    size, sign = scale(held["total"])
    rows = f" in {held['batch']:,} rows" if held["batch"] > 1 else ""
    about = {
        "weights": "without embedding and vision tower",
        "embedding": "also the output head",
        "cache": f"keys and values of {held['tokens']:,} tokens{rows}",
        "activations": "a bound: the widest part of a layer",
        "logits": "a slice of them, and what it becomes",
    }
    other = "" if held["fused_total"] == held["total"] else f"{held['fused_total'] / size:,.2f} with kernels"
    goal = ""
    if held["limit"]:
        goal = (
            f"goal: under {held['limit'] / size:,.0f} {sign}B, {'met' if held['most'] < held['limit'] else 'not met'}"
        )
    found = [(part, amount, about[part]) for part, amount in held["parts"].items()]
    found += [
        ("in use at most", held["total"], other),
        ("kept for reuse", held["freed"], "freed buffers; they give way"),
    ]
    found += [("together", held["most"], goal)]
    shown = [[name, f"{amount / size:,.2f}", remark] for name, amount, remark in found]
    return Table(("memory", f"{sign}B", ""), shown, 3, (2,), (0, 2))


def memory_remarks(plan: dict[str, Any]) -> list[str]:
    held, chip = plan["memory"], plan["chip"]
    smallest, fused = held["smallest"], held["smallest_fused"]
    lines = ["fits no Mac that was sold"]
    if smallest is not None:
        wired = next(mac["wired"] for mac in held["macs"] if mac["memory"] == smallest)
        lines = [
            f"fits Macs from {smallest} GB on, of whose memory macOS lets the GPU keep about {wired / GIGA:,.1f} GB; "
            f"chips that can be had with that much: {', '.join(held['chips'])}"
        ]
    if fused != smallest:
        lines[0] += f". With kernels from {fused} GB on"
    if held["total"] != held["fused_total"]:
        lines.append("judged as load does: without kernels, until they are proven")
    if chip["name"] not in held["chips"]:
        lines.append(f"too large for any {chip['name']}: that was sold with {CHIPS[chip['name']].memory} GB at most")
    if held["here"] is not None:
        verdict = "fits" if held["total"] <= held["here"] else "does not fit"
        lines.append(f"this machine's GPU may keep {held['here'] / GIGA:,.1f} GB: {verdict}")
    return lines
