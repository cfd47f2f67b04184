"""Print what the last test run measured: ``python tests/parity/table.py``, after ``make test``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

REPORT = Path(__file__).parents[2] / "build" / "parity"
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
    worst = {model: max((row[model] for row in cases.values() if model in row), default=0.0) for model in models}
    lines = [f"{'':44}" + "".join(f"{model:>11}" for model in models)]
    for case, row in [*cases.items(), ("worst", worst)]:
        lines.append(f"{case:44}" + "".join(f"{row[m]:11.1e}" if m in row else f"{'':11}" for m in models))
    return "\n".join(lines)


def kernels(found: list[dict]) -> str:
    """What was shown of the Triton kernels without a GPU: in which dtypes interpreted, and compiled for which cards."""
    dtypes, shared = defaultdict(set), defaultdict(dict)
    for entry in found:
        if entry.get("what") == "interpreted":
            dtypes[entry["kernel"]].add(entry["dtype"])
        elif entry.get("what") == "compiled":
            shared[entry["file"]][entry["sm"]] = f"sm_{entry['sm']} {entry['shared'] / 1024:.0f} KiB"
    lines = [f"  interpreted  {kernel:18}{', '.join(sorted(names))}" for kernel, names in sorted(dtypes.items())]
    lines += [
        f"  compiled     {file:18}{', '.join(cards[sm] for sm in sorted(cards))}" for file, cards in shared.items()
    ]
    return "\n".join(lines)


def main() -> None:
    found = entries()
    for key, (title, models) in TABLES.items():
        print(title)
        print(table([entry for entry in found if key in entry and "difference" in entry], key, models))
    print("Triton kernels, none of them on a GPU; the most shared memory of a file's kernels, per card")
    print(kernels(found))
    for entry in found:
        if "difference" not in entry and entry.get("what") not in ("interpreted", "compiled"):
            name = entry.pop("test")
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
