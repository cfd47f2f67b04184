"""The result file: one row per configuration, rewritten whole after every figure, so that nothing is lost.

``ROW`` is the schema of a row; what was not measured is null. ``errors`` of a row says what of it failed, ``skipped``
and ``errors`` of the file what never began and what ended a process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IDENTITY = ("what", "mode", "precision", "head", "batch", "prompt_tokens")
ROW: dict[str, type | tuple[type, ...]] = {
    "what": str,  # ours, transformers
    "mode": str,  # graph; of transformers eager, static
    "precision": str,  # bf16, fp8, 4bit
    "head": str,  # bf16, fp8
    "batch": int,
    "prompt_tokens": int,
    "recipe": str,  # of ``convert``
    "ms_per_step": float,
    "eager_ms": float,  # ours, every operation started by the host
    "floor_ms": float,
    "parts_ms": dict,
    "parts_floor_ms": dict,
    "parts_gb": dict,  # that a part must move
    "fixed16_tok_s": float,
    "fixed16": dict,
    "prefill_tok_s": float,
    "peak_gb": float,
    "weights_gb": float,
    "routing": dict,
    "in_force": dict,
    "errors": dict,
}
PACKAGES = ("torch", "triton", "transformers", "numpy")
SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


class Record:
    """The file at ``path``, made when it is not there."""

    def __init__(self, path: Path):
        self.path = path
        empty: dict[str, Any] = {"rows": [], "bandwidth": {}, "skipped": [], "errors": [], "done": {}, "seconds": {}}
        self.data = json.loads(path.read_text()) if path.is_file() else empty

    def row(self, **identity: Any) -> dict[str, Any]:
        """The row of this identity, a new one where there is none yet."""
        assert identity.keys() == set(IDENTITY), identity
        for row in self.data["rows"]:
            if all(row[name] == value for name, value in identity.items()):
                return row
        self.data["rows"].append(dict.fromkeys(ROW) | identity | {"errors": {}})
        return self.data["rows"][-1]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)


def problems(data: dict[str, Any]) -> list[str]:
    """What is wrong with a result file, in words."""
    found = [f"{name} is missing" for name in ("card", "date", "versions", "bandwidth", "rows") if name not in data]
    for i, row in enumerate(data.get("rows", ())):
        found += [f"row {i}: {name} is unknown" for name in row.keys() - ROW.keys()]
        found += [f"row {i}: {name} is missing" for name in ROW.keys() - row.keys()]
        for name, kind in ROW.items():
            value = row.get(name)
            allowed = (int, float) if kind is float else kind
            if value is None and name in IDENTITY:
                found.append(f"row {i}: {name} is null")
            elif value is not None and not isinstance(value, allowed):
                found.append(f"row {i}: {name} is {value!r}")
    return found


def file_of(card: str, when: float | None = None) -> Path:
    """gpu-CARD-DATE.json; a second one of a day counts on."""
    date = time.strftime("%Y-%m-%d", time.gmtime(when))
    stem = f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}-{date}"
    free = (RESULTS / f"{stem}{suffix}.json" for suffix in ["", *(f"-{n}" for n in range(2, 100))])
    return next(path for path in free if not path.exists())


def smi() -> dict[str, str]:
    """What the driver says of the first card."""
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(SMI.split(","), (value.strip() for value in line.split(",")), strict=False))


def machine() -> dict[str, Any]:
    """What the numbers depend on. The clocks are those of an idle card; ``clocks`` of a stage those under load."""
    import torch

    found: dict[str, Any] = {"card": "cpu", "sm": None, "memory_gb": None}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found = {"card": card.name, "sm": 10 * card.major + card.minor, "memory_gb": card.total_memory / 1e9}
    driver = smi()
    return found | {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "driver": driver.get("driver_version"),
        "smi": driver,
        "versions": versions() | {"cuda": torch.version.cuda},
        "system": platform.platform(),
        "commit": git("rev-parse", "HEAD"),
        "changed": (git("status", "--porcelain") or "").splitlines(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git(*arguments: str) -> str | None:
    """None where there is no repository, as on a machine that was handed the files alone."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": os.environ | {"GIT_OPTIONAL_LOCKS": "0"}}
    try:
        return subprocess.run(["git", *arguments], check=True, **options).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None
