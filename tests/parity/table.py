"""Print what the last test run measured: ``python tests/parity/table.py``, after ``make test``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

REPORT = Path(__file__).parents[2] / "build" / "parity"
MODELS = ("reference", "mlx", "cpu")


def entries() -> list[dict]:
    return [json.loads(line) for file in sorted(REPORT.glob("*.jsonl")) for line in file.read_text().splitlines()]


def main() -> None:
    cases: dict[str, dict[str, float]] = defaultdict(dict)
    others = []
    for entry in entries():
        if "difference" in entry:
            cases[entry["case"]][entry["model"]] = entry["difference"]
        else:
            others.append(entry)
    print("max |difference| to transformers, fp32")
    print(f"{'case':44}" + "".join(f"{model:>11}" for model in MODELS))
    for case, row in cases.items():
        print(f"{case:44}" + "".join(f"{row.get(model, float('nan')):11.1e}" for model in MODELS))
    worst = [max((row[model] for row in cases.values() if model in row), default=0.0) for model in MODELS]
    print(f"{'worst':44}" + "".join(f"{value:11.1e}" for value in worst))
    for entry in others:
        name = entry.pop("test")
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
