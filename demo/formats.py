"""What each recipe costs the demo: the same held-out prompts and seeds, answered in every format.

    python demo/formats.py --count 2000 --out demo/formats.json

Paired with the bfloat16 checkpoint: the difference of the solve rates and its 95 % interval (``convert.quality``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from evaluate import Answer, answers, paired
from tasks import evaluation_set

from convert.command import main as convert
from mlx_diffgemma import load

RECIPES = {
    "w8": "mlx",
    "experts4": "mlx",
    "mxfp8": "mlx",
    "mxfp4": "mlx",
    "nvfp4": "mlx",
    "fp8": "compressed-tensors",
    "experts4-fp8": "compressed-tensors",
    "q8_0": "gguf",
}
W8A8 = ("fp8", "experts4-fp8")  # once more, with activations in FP8 as well


def answered(model: str | Path, backend: str, count: int, activations: str | None = None) -> list[Answer]:
    opened, processor = load(model, backend=backend, dtype="float32", activations=activations)
    return answers(opened, processor, evaluation_set(count))


def row(found: list[Answer]) -> dict:
    right, steps = sum(a.right for a in found), sum(a.steps for a in found)
    return {"right": right, "count": len(found), "steps_per_canvas": steps / sum(a.canvases for a in found)}


def line(recipe: str, cost: dict) -> str:
    low, high = cost["interval"]
    return f"{recipe:18}{cost['right']:5} right  {cost['difference']:+.2%} [{low:+.2%}, {high:+.2%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    whole = answered("demo", options.backend, options.count)
    rows = {"bf16": row(whole)}

    def add(name: str, target: str, found: list[Answer]) -> None:
        rows[name] = {"to": target} | row(found) | paired(whole, found)
        print(line(name, rows[name]), flush=True)

    for recipe, target in RECIPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / recipe
            arguments = ["demo", "--to", target, "--recipe", recipe, "--out", str(folder), "--quiet"]
            if convert(arguments):
                raise SystemExit(f"the demo could not be converted with {' '.join(arguments)}")
            add(recipe, target, answered(folder, options.backend, options.count))
            if recipe in W8A8:
                add(f"{recipe} W8A8", target, answered(folder, options.backend, options.count, activations="fp8"))
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        record = {"commit": commit, "backend": options.backend, "dtype": "float32", "formats": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
