"""Results of ``benchmarks.gpu`` as a table, as goals met or missed, and as a picture of every part against its floor.

    .venv/bin/python -m benchmarks.gpu_report [RESULT.json ...] [--picture docs/gpu.png] [--readme]

Without a result it says that no GPU has run it. Nothing is estimated: what was not measured is a blank.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_floor import PARTS, gpu_named
from .gpu_record import RESULTS, ROOT

NONE = (
    "No GPU has run `make gpu` yet. The figures stay blank; the floors that they will stand beside are in "
    "`python -m benchmarks.gpu_floor`."
)
BEGIN, END = "<!-- gpu results: written by benchmarks.gpu_report -->", "<!-- end of gpu results -->"
HEAD = ("", "weights", "head", "batch", "prompt", "ms/step", "floor", "x floor", "tok/s", "prefill tok/s", "peak GB")
Result = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """At batch 1 behind 1,024 tokens: at most ``step`` milliseconds, at least ``protocol`` tokens per second."""

    card: str
    precision: str
    head: str
    step: float
    protocol: float


GOALS = (
    Goal("H200", "fp8", "bf16", 7.8, 1800),
    Goal("H200", "fp8", "fp8", 7.4, 1900),
    Goal("H200", "4bit", "fp8", 5.0, 2600),
)


def found(folder: Path = RESULTS) -> list[Path]:
    """All results, oldest first."""
    return sorted(folder.glob("gpu-*.json"))


def newest(results: Iterable[Result]) -> list[Result]:
    """Of each card the latest."""
    latest: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: result["date"]):
        latest[result["card"]] = result
    return list(latest.values())


# ---- the table


def report(result: Result) -> str:
    """One result in Markdown: conditions, a table, the parts of the first row that has them, and what is missing."""
    rows = sorted(result["rows"], key=lambda row: (row["prompt_tokens"], row["batch"]))
    lines = [conditions(result), "", *table([HEAD, *(cells(row) for row in rows)])]
    measured = [row for row in result["rows"] if row["parts_ms"]]
    if measured:
        lines += ["", *parts(measured[0], result)]
    failed = [f"- {name_of(row)}, {piece}: {first(text)}" for row in rows for piece, text in row["errors"].items()]
    left = failed + [f"- skipped: {text}" for text in result["skipped"]] + [f"- {first(e)}" for e in result["errors"]]
    return "\n".join(lines + (["", "Not measured:", "", *left] if left else []))


def conditions(result: Result) -> str:
    """What the figures were measured on, and at what bandwidth the same card copies."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    rates = next(iter(result["bandwidth"].values()), None)
    copied = f"; copies at {rates['copy']:,.0f} GB/s, reads at {rates['read']:,.0f}" if rates else ""
    return f"{result['card']}, {result['date'][:10]}, driver {result['driver']}, {versions}{copied}. Random weights."


def cells(row: Row) -> tuple[str, ...]:
    who = "" if row["what"] == "ours" else f"transformers, {row['mode']}"
    ratio = row["ms_per_step"] / row["floor_ms"] if row["ms_per_step"] and row["floor_ms"] else None
    shown = (row["ms_per_step"], row["floor_ms"], ratio)
    rest = (number(row["fixed16_tok_s"], 0), number(row["prefill_tok_s"], 0), number(row["peak_gb"], 1))
    asked = (f"{row['batch']}", f"{row['prompt_tokens']:,}")
    return (who or "ours", row["precision"], row["head"], *asked, *(number(x, 2) for x in shown), *rest)


def parts(row: Row, result: Result) -> list[str]:
    """Time, floor and their ratio of every part; the bandwidth it reaches, also as a share of a read's."""
    floors, rates = row["parts_floor_ms"] or {}, result["bandwidth"].get(row["precision"])
    lines = [("part", "ms", "floor", "x floor", "GB", "GB/s", "of a read")]
    for part in PARTS:
        time, floor, size = row["parts_ms"].get(part), floors.get(part), row["parts_gb"][part]
        rate = size / time * 1000 if time else None
        share = f"{rate / rates['read']:.0%}" if rate and rates else ""
        ratio = time / floor if time and floor and floor > 0.01 else None
        sizes = (number(size, 2), number(rate, 0), share)
        lines.append((part, number(time, 3), number(floor, 3), number(ratio, 2), *sizes))
    total = sum(row["parts_ms"].values())
    ratio = total / row["floor_ms"] if row["floor_ms"] else None
    lines.append(("sum", number(total, 3), number(row["floor_ms"], 3), number(ratio, 2), "", "", ""))
    return [f"{name_of(row)}:", "", *table(lines)]


def name_of(row: Row) -> str:
    who = "ours" if row["what"] == "ours" else f"transformers ({row['mode']})"
    return f"{who}, {row['precision']}, head {row['head']}, batch {row['batch']}, prompt {row['prompt_tokens']:,}"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def first(text: str) -> str:
    return text.splitlines()[0][:200] if text else ""


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first line is the head, columns of figures are set to the right."""
    head, *body = lines
    figures = [any(line[i][:1].isdigit() for line in body) for i in range(len(head))]
    rule = ["---:" if figure else "---" for figure in figures]
    return [f"| {' | '.join(line)} |" for line in [head, rule, *body]]


# ---- goals


def goals(results: Iterable[Result]) -> str:
    """One line per goal: met or missed where it was measured on that card, else not measured."""
    rows = [(gpu_named(result["card"]), row) for result in results for row in result["rows"] if row["what"] == "ours"]
    lines = []
    for goal in GOALS:
        identity = (goal.card, goal.precision, goal.head, 1, 1024)
        mine = [r for card, r in rows if (card, r["precision"], r["head"], r["batch"], r["prompt_tokens"]) == identity]
        row = mine[-1] if mine else {}
        step, protocol = row.get("ms_per_step"), row.get("fixed16_tok_s")
        one = judged(step, f"{goal.step:g} ms/step at most", step is not None and step <= goal.step)
        two = judged(protocol, f"{goal.protocol:,g} tok/s at least", protocol is not None and protocol >= goal.protocol)
        lines.append(f"goal, {goal.card}, {goal.precision}, head {goal.head}: {one}; {two}")
    return "\n".join(lines)


def judged(value: float | None, goal: str, met: bool) -> str:
    if value is None:
        return f"{goal}: not measured"
    return f"{goal}: {value:,.2f}, {'met' if met else 'missed'}"


# ---- for the README


def section(results: list[Result]) -> str:
    """What stands between the README's two marks."""
    text = "\n\n".join(report(result) for result in newest(results)) or NONE
    return f"{BEGIN}\n{text}\n{END}"


def placed(readme: str, text: str) -> str:
    """The README with its section replaced.

    Raises:
        ValueError: it has no such section.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no section between {BEGIN!r} and {END!r}")
    return readme[: readme.index(BEGIN)] + text + readme[readme.index(END) + len(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(description="GPU results as a table, as goals and as a picture")
    parser.add_argument("results", nargs="*", type=Path, help="default: all in benchmarks/results")
    parser.add_argument("--picture", type=Path, help="write a PNG here")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md, between its two marks")
    chosen = parser.parse_args()
    results = [json.loads(path.read_text()) for path in chosen.results or found()]
    if not results:
        print(NONE)
    for result in newest(results):
        print(report(result), end="\n\n")
    print(goals(results))
    if chosen.readme:
        path = ROOT / "README.md"
        path.write_text(placed(path.read_text(encoding="utf-8"), section(results)), encoding="utf-8")
    if chosen.picture and results:
        from .gpu_picture import draw

        draw(newest(results)[-1]).save(chosen.picture)


if __name__ == "__main__":
    main()
