"""What ``bench`` measured, as Markdown that can go into an issue as it is."""

from __future__ import annotations

from typing import Any

FIGURES = {
    "milliseconds_per_step": ("ms per step", 1, 1.0),
    "steps_per_canvas": ("steps per canvas", 1, 1.0),
    "tokens_per_second": ("tokens per second", 1, 1.0),
    "tokens_per_forward": ("tokens per forward", 2, 1.0),
    "first_draft": ("first draft, ms", 0, 1000.0),
    "first_block": ("first block, ms", 0, 1000.0),
    "prefill_tokens_per_second": ("prefill, tokens per second", 0, 1.0),
}


def markdown(record: dict[str, Any]) -> str:
    where, task, ours = record["conditions"], record["task"], record["ours"]
    model = where["model"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"**{where['machine']}**, {where['system']}, {label(model)}, {model['dtype']}; {versions}"
        + (f"; commit {where['commit'][:12]}" if where["commit"] else ""),
        f"Prompt of {task['prompt_tokens']:,} tokens, {task['blocks']} block(s) at most, seed {task['seed']}, median "
        f"of {task['rounds']} (least to most). Weights {memory(model['weight_bytes'])}.",
        *chosen(record.get("options", {}), model),
        "",
        "| figure | median | least | most |",
        "|---|---:|---:|---:|",
        *(figure(name, ours[key], digits, factor) for key, (name, digits, factor) in FIGURES.items()),
        f"| peak memory | {memory(ours['peak_memory'])} | | |",
    ]
    if record["parts"]:
        lines += ["", *parts(record["parts"], ours["milliseconds_per_step"]["median"])]
    if record["peers"]:
        lines += ["", *peers(record["peers"], ours)]
    return "\n".join(lines)


def chosen(options: dict[str, str], model: dict[str, Any]) -> list[str]:
    """What was asked for, and what of it is not exact: figures mean nothing without it."""
    asked = ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none"
    return [f"Options: {asked}. Approximations: {'; '.join(model.get('approximations', [])) or 'none'}."]


def memory(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def label(model: dict[str, Any]) -> str:
    """Where it ran and by what: a CPU's figures must never pass for a GPU's."""
    kernels = model.get("kernels", "ops")
    mode = ", ".join(kernels.get("fused", [])) or "plain operations" if isinstance(kernels, dict) else str(kernels)
    return f"backend {model['backend']} on {model['device']} ({mode})"


def figure(name: str, values: dict[str, float], digits: int, factor: float) -> str:
    shown = (f"{factor * values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"| {name} | {' | '.join(shown)} |"


def parts(found: dict[str, dict[str, float]], step: float) -> list[str]:
    total = sum(part["milliseconds"] for part in found.values())
    rows = sorted(found.items(), key=lambda item: -item[1]["milliseconds"])
    return [
        "| part of a step, each operation alone | ms | least | most | calls | share |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {p['milliseconds']:,.2f} | {p['min']:,.2f} | {p['max']:,.2f} | {p['calls']:,.0f} "
            f"| {p['milliseconds'] / total:.0%} |"
            for name, p in rows
        ),
        f"| sum (a step takes {step:,.1f}) | {total:,.2f} | | | | |",
    ]


def peers(found: list[dict[str, Any]], ours: dict[str, Any]) -> list[str]:
    lines = [
        "| same prompt, in turn | tokens per second | steps per canvas | first text, ms | peak memory "
        "| ours / theirs (least to most) |",
        "|---|---:|---:|---:|---:|---:|",
        f"| mlx-diffgemma | {ours['tokens_per_second']['median']:,.1f} | {ours['steps_per_canvas']['median']:.1f} "
        f"| {1000 * ours['first_draft']['median']:,.0f} | {memory(ours['peak_memory'])} | |",
    ]
    return lines + [peer_row(peer) for peer in found]


def peer_row(peer: dict[str, Any]) -> str:
    ratio, first, steps = peer["ratio"], peer.get("first"), peer.get("steps_per_canvas")
    name = f"{peer['kind']} {peer['versions'].get(peer['kind'], '')} {peer['model']}"
    if not first:
        return f"| {name} | no text | | | | |"
    denoised = f"{steps['median']:.1f}" if steps else ""
    shown = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "no tokens"
    return (
        f"| {name} | {peer['tokens_per_second']['median']:,.1f} | {denoised} | {1000 * first['median']:,.0f} "
        f"| {memory(1e9 * peer['peak_memory']['median'])} | {shown} |"
    )
