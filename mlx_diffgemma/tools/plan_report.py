"""``--plan`` for people: one table of the work of a step, one of memory. Plain text in a pipe."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .chips import GIGA


def show(plan: dict[str, Any], console: Console) -> None:
    console.print(heading(plan), highlight=False)
    console.print(work_table(plan))
    for line in remarks(plan):
        console.print(line, highlight=False)
    console.print()
    console.print(memory_table(plan))
    for line in memory_remarks(plan):
        console.print(line, highlight=False)


def heading(plan: dict[str, Any]) -> str:
    chip, batch = plan["chip"], plan["batch"]
    rows = f", batch {batch}" if batch > 1 else ""
    head = f", head over {plan['head_positions']} positions" if plan["head_positions"] < plan["canvas_length"] else ""
    return (
        f"{plan['model']}, {plan['format']}: one denoising step of {plan['canvas_length']} tokens behind "
        f"{plan['prompt_tokens']:,}{rows}{head}\n{chip['name']}: {chip['bandwidth']:g} GB/s, {chip['cores']} GPU cores"
        f", {chip['tflops']:.1f} TFLOP/s float16 at most. Counted from shapes; nothing here was measured."
    )


def scale(amount: float) -> tuple[float, str]:
    """A unit in which a total of ``amount`` reads well: what it is divided by, and its prefix."""
    return next(((size, sign) for size, sign in ((1e9, "G"), (1e6, "M")) if amount >= size), (1e3, "k"))


def work_table(plan: dict[str, Any]) -> Table:
    total = plan["total"]
    size, operation = scale(total["fused"]["bytes"]), scale(total["fused"]["operations"])
    time = (1.0, "ms") if total["fused"]["milliseconds"] >= 1 else (1e-3, "µs")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    moved, floor = f"{size[1]}B", time[1]
    heads = (f"plain {moved}", f"kernels {moved}", "saved", f"{operation[1]}FLOP", f"floor {floor}", f"kernels {floor}")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for part in plan["parts"]:
        table.add_row(*cells(part, size[0], operation[0], time[0]))
    table.add_section()
    table.add_row(*cells(total, size[0], operation[0], time[0]), style="bold")
    return table


def cells(part: dict[str, Any], size: float, operation: float, time: float) -> list[str]:
    plain, fused = part["plain"], part["fused"]
    saved = f"{part['saved']:.0%}" if part["saved"] > 0.005 else ""
    before, after = (f"{side['operations'] / operation:,.0f}" for side in (plain, fused))
    work = after if before == after else f"{before} to {after}"
    moved = [f"{side['bytes'] / size:.2f}" for side in (plain, fused)]
    return [part["part"], *moved, saved, work, *(f"{side['milliseconds'] / time:.2f}" for side in (plain, fused))]


def remarks(plan: dict[str, Any]) -> list[str]:
    target, prefix = plan["vocabulary_and_attention"], plan["prefix"]
    size, sign = scale(target["fused"])
    lines = [
        f"vocabulary + attention traffic: {target['plain'] / size:.2f} {sign}B plain, {target['fused'] / size:.2f} "
        f"{sign}B with kernels: {target['less']:.0%} less (goal: at least 35%). If plain operations took slices as "
        f"large: {target['less_at_equal_slices']:.0%}; where attention stays plain: "
        f"{target['less_with_plain_attention']:.0%}; with both: {target['less_with_both']:.0%}",
        f"copies of the prefix per step: {prefix['copied']} bytes (joining prefix and canvas in every layer would move "
        f"{prefix['joining_would_move'] / size:.2f} {sign}B)",
        "floor: the larger of bytes / bandwidth and operations / rate, part by part; kernels change no product, only "
        "what stands between them",
    ]
    if plan["survivors"] is not None:
        lines.append(f"survivors: {plan['survivors']:g} per row are assumed; a flat row costs what dense does")
    return lines


def memory_table(plan: dict[str, Any]) -> Table:
    held = plan["memory"]
    size, sign = scale(held["total"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column(f"{sign}B", justify="right", no_wrap=True)
    table.add_column("")
    rows = f" in {held['batch']} rows" if held["batch"] > 1 else ""
    about = {
        "weights": "without the embedding; no vision tower",
        "embedding": "also the output head",
        "cache": f"keys and values of {held['tokens']:,} tokens{rows}",
        "activations": "a bound: the widest part of a layer, reading or denoising",
        "logits": "a slice of them, and what is made from it",
    }
    for part, amount in held["parts"].items():
        table.add_row(part, f"{amount / size:.2f}", about[part])
    table.add_section()
    table.add_row("in use at most", f"{held['total'] / size:.2f}", f"{held['plain_total'] / size:.2f} without kernels")
    table.add_row("kept for reuse", f"{held['freed'] / size:.2f}", "freed buffers, at most; they give way")
    goal = f"goal: under {held['limit'] / size:.0f} {sign}B" if held["limit"] else ""
    table.add_row("together", f"{held['most'] / size:.2f}", goal, style="bold")
    return table


def memory_remarks(plan: dict[str, Any]) -> list[str]:
    held = plan["memory"]
    smallest = next((mac for mac in held["macs"] if mac["fits"]), None)
    lines = ["fits on no Mac that was sold"]
    if smallest is not None:
        lines = [
            f"fits Macs from {smallest['memory']} GB on, of whose memory macOS lets the GPU keep about "
            f"{smallest['wired'] / GIGA:.1f} GB; chips sold with as much: {', '.join(held['chips'])}"
        ]
    if held["here"] is not None:
        verdict = "fits" if held["total"] <= held["here"] else "does not fit"
        lines.append(f"this machine's GPU may keep {held['here'] / GIGA:.1f} GB: {verdict}")
    return lines
