"""Print what the last test run measured: ``python tests/parity/table.py``, after ``make test``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

REPORT = Path(__file__).parents[2] / "build" / "parity"
NO_CHIP = ("cpu-emulated", "metal-vm")
TABLES = {  # the key of a case, what it is compared with, and by whom
    "case": ("max |difference| of logits to transformers, fp32", ("reference", "mlx", "cpu")),
    "format": (
        "and of quantized checkpoints, to their dequantized weights",
        ("reference", "mlx", "cpu", "mlx-vlm"),
    ),
}


def entries() -> list[dict]:
    return [json.loads(line) for file in sorted(REPORT.glob("*.jsonl")) for line in file.read_text().splitlines()]


def table(found: list[dict], key: str, models: tuple[str, ...]) -> str:
    """One line per case, the worst of each at the end; a case that was recorded more than once counts as its worst."""
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in found:
        row, model = cases[entry[key]], entry.get("model", "")
        row[model] = max(row.get(model, 0.0), entry["difference"])
    seen = [model for model in models if any(model in row for row in cases.values())]
    worst = {model: max(row[model] for row in cases.values() if model in row) for model in seen}
    lines = [f"{'':44}" + "".join(f"{model:>11}" for model in models)]
    for case, row in [*cases.items(), ("worst", worst)]:
        figures = "".join(f"{row[m]:11.1e}" if m in row else f"{'':11}" for m in models)
        lines.append(f"{case:44}{figures}".rstrip())
    return "\n".join(lines)


def kernels(found: list[dict]) -> str:
    """What was shown of the Triton kernels without a GPU: in which dtypes interpreted, and compiled for which cards."""
    shared = defaultdict(dict)
    for entry in found:
        if entry.get("what") == "compiled":
            shared[entry["file"]][entry["sm"]] = f"sm_{entry['sm']} {entry['shared'] / 1024:.0f} KiB"
    compiled = [line("compiled", file, [cards[sm] for sm in sorted(cards)]) for file, cards in shared.items()]
    return "\n".join([*by_kernel(found, "interpreted"), *compiled])


def metal(found: list[dict]) -> str:
    """In which dtypes the Metal kernels ran, and on what stood for a Mac's GPU."""
    return "\n".join(text for what in NO_CHIP for text in by_kernel(found, what))


def by_kernel(found: list[dict], what: str) -> list[str]:
    dtypes = defaultdict(set)
    for entry in found:
        if entry.get("what") == what:
            dtypes[entry["kernel"]].add(entry["dtype"])
    return [line(what, kernel, sorted(names)) for kernel, names in sorted(dtypes.items())]


def line(what: str, name: str, shown: list[str]) -> str:
    return f"  {what:14}{name:18}{', '.join(shown)}"


def main() -> int:
    found = entries()
    if not found:
        print(f"no record in {REPORT}; run make test", file=sys.stderr)
        return 2
    for key, (title, models) in TABLES.items():
        print(title)
        print(table([entry for entry in found if key in entry and "difference" in entry], key, models))
    print("Triton kernels, none of them on a GPU; the most shared memory of a file's kernels, per card")
    print(kernels(found))
    print("Metal kernels, none of them on a chip")
    print(metal(found))
    for entry in found:
        if "difference" not in entry and entry.get("what") not in ("interpreted", "compiled", *NO_CHIP):
            name = entry.pop("test")
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in entry.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
