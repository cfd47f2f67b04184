"""``conversion_manifest.json``: what was converted from what and how, what it cost, and the hash of every file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma import __version__
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.json_file import read_json

from .digest import facts
from .edges import Error, Errors
from .plan import Item, Plan

MANIFEST = "conversion_manifest.json"
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a repository in the hub's cache
Facts = Mapping[str, Mapping[str, Any]]


def library() -> str:
    return f"mlx-diffgemma {__version__}"


def origin(checkpoint: Checkpoint) -> str:
    """The name of a source: of its repository where the hub's cache says so, else of its folder, or its file."""
    path = checkpoint.files[0].absolute()
    for part in path.parts:
        if match := CACHED.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return path.parent.resolve().name if path.suffix == ".safetensors" else path.name


def ancestors(checkpoint: Checkpoint) -> list[str]:
    """What the source itself was made from, nearest first."""
    path = checkpoint.files[0].parent / MANIFEST
    if not path.is_file():
        return []
    source = read_json(path).get("source", {})
    return [source["name"], *source.get("made_from", [])] if isinstance(source, dict) and "name" in source else []


def build(plan: Plan, errors: Errors, inputs: Facts, outputs: Facts) -> dict[str, Any]:
    """No time and no path in it: the same conversion gives the same bytes."""
    checkpoint = plan.checkpoint
    source: dict[str, Any] = {"name": origin(checkpoint), "format": checkpoint.format}
    made_from = ancestors(checkpoint)
    return {
        "library": library(),
        "source": source | ({"made_from": made_from} if made_from else {}) | {"files": inputs},
        "target": plan.target.name,
        "recipe": plan.recipe.resolved(),
        "text_only": plan.text_only,
        "parameters": plan.values,
        "bytes": plan.nbytes,
        "bits_per_weight": round(plan.bits(), 4),
        "errors_by_role": {role: rounded(error) for role, error in by_role(plan, errors).items()},
        "tensors": {item.row.name: _tensor(item, errors.get(item.row.name)) for item in plan.items},
        "outputs": outputs,
    }


def by_role(plan: Plan, errors: Errors) -> dict[str, Error]:
    found: dict[str, Error] = {}
    for item in plan.items:
        if item.row.name in errors:
            found[item.row.role] = found.get(item.row.role, Error()) + errors[item.row.name]
    return found


def rounded(error: Error) -> float:
    """Four digits: more would differ between machines."""
    return float(f"{error.relative:.4g}")


def _tensor(item: Item, error: Error | None) -> dict[str, Any]:
    found = {"role": item.row.role, "from": item.stored.format, "to": item.format, "edge": item.edge}
    found |= {"note": item.note} if item.note else {}
    return found | ({"error": rounded(error)} if error else {})


def verify(folder: Path) -> list[str]:
    """The files that are not as the manifest has them; none when all is well.

    Raises:
        FileNotFoundError, CheckpointError: there is no manifest, or it lists nothing.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}, as every conversion writes it: there is nothing to verify"
        )
    outputs = read_json(folder / MANIFEST).get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        raise CheckpointError(f"{folder / MANIFEST} lists no outputs; convert again")
    return [f"{name} {fault}" for name, known in outputs.items() if (fault := _fault(folder, name, known))]


def _fault(folder: Path, name: str, known: Any) -> str:
    path = folder / name
    if Path(name).name != name or not isinstance(known, dict):
        return "is no file of this folder"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != known.get("bytes"):
        return f"has {size:,} bytes, not {known.get('bytes')!r}"
    return "" if facts(path) == known else "has other contents"
