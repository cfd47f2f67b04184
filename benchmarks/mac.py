"""Everything that only a Mac can tell, in one go: ``make mac``, or ``python -m benchmarks.mac --model demo``.

The tests of the kernels on the GPU, which write down what is proven; then a model, measured; then what to send. Nothing
is imported before it is known to be there, so that what is missing can be said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("build", "mac")
NEEDED = ("mlx", "pytest", "tokenizers")
TESTS = "tests/metal_kernels"
AUTOREGRESSIVE = "mlx-community/gemma-4-26b-a4b-it-4bit"  # the twin that writes token by token
ROOM = 18 * 10**9  # bytes of one model of that size; peers are in memory together with ours
WITH_MATRICES = f"{TESTS}/test_attention*.py"  # of kernels that need simdgroup_matrix, which no virtual machine has


def problem() -> str:
    """Why nothing can be shown here, on one line; "" on a Mac that has what it takes."""
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return f"this is no Mac with Apple silicon, but {platform.system()} on {platform.machine()}"
    remedy = "`make setup` makes one that can, or give PYTHON=/path/to/it"
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11):
        return f"{sys.executable} is Python {platform.python_version()}, and 3.11 or newer is needed: {remedy}"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}: {remedy}"
    import mlx.core as mx

    return "" if mx.metal.is_available() else f"MLX in {sys.executable} sees no Metal GPU"


def peers(model: str, memory: int) -> list[str]:
    """Options for what ours is measured beside: what is installed and has room. The demo is known to none of them."""
    installed = {"mlx_lm": ["--against-ar", AUTOREGRESSIVE], "mlx_vlm": ["--against", "mlx-vlm"]}
    found = [] if model == "demo" else [name for name in installed if importlib.util.find_spec(name)]
    fitting = found[: max(0, memory // ROOM - 1)]
    for name in found[len(fitting) :]:
        print(f"{name} is left out: {memory / 1e9:.0f} GB have no room for its model beside the others", flush=True)
    return [option for name in fitting for option in installed[name]]


def commands(model: str, virtual: bool, beside: list[str]) -> list[list[str]]:
    tests = [sys.executable, "-m", "pytest", "-m", "metal", "--continue-on-collection-errors", TESTS]
    if virtual:
        tests.append(f"--ignore-glob={WITH_MATRICES}")
    bench = [sys.executable, "-m", "mlx_diffgemma", "bench", "--model", model, "--json", str(OUT / "bench.json")]
    return [tests, bench + beside]


def report(virtual: bool) -> str:
    """What is ready to be sent."""
    from mlx_diffgemma.mlx_backend.kernels.choice import PROVEN, proven_here

    measured = f"measured: {OUT / 'bench.json'}"
    if virtual:
        return f"metal-vm: a virtual machine proves nothing about a chip, {PROVEN.name} stays as it is\n{measured}"
    rows = [json.dumps(row) for row in proven_here()]
    where = PROVEN.relative_to(ROOT)
    return "\n".join(
        [f"rows of {where} for this Mac, ready to send:" if rows else f"no row of {where}", *rows, measured]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="prove the kernels on this Mac, and measure a model")
    parser.add_argument("--model", required=True, help="a folder, a name on the hub, or demo for a quick try")
    model = parser.parse_args().model
    if found := problem():
        print(f"make mac: {found}", file=sys.stderr)
        return 2
    from mlx_diffgemma.mlx_backend import memory
    from mlx_diffgemma.mlx_backend.kernels.chip import chip_here

    chip = chip_here()
    assert chip is not None
    print(f"{chip.name} ({chip.architecture}), macOS {platform.mac_ver()[0]}", flush=True)
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    # Should a kernel fail, measuring goes on without it.
    todo = commands(model, chip.virtual, peers(model, memory("auto")))
    status = [subprocess.call(command, cwd=ROOT) for command in todo]
    print(report(chip.virtual))
    return max(map(abs, status))


if __name__ == "__main__":
    sys.exit(main())
