"""The plan of a model on a Mac, before anything is downloaded: the work of a step by part, and the memory it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..config import ModelConfig
from ..errors import OptionError
from ..formats import gguf_model, open_checkpoint
from ..formats.encoding import Encoding
from ..json_file import read_json
from ..memory import width_of
from ..tensors import item_bytes
from . import work, work_ends
from .chips import CHIPS, MEMORIES, Chip, wired
from .plan_memory import memory_plan
from .work import Cost, Load

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "diffusiongemma-26B-A4B-it.json"
NAME = "diffusiongemma-26B-A4B-it"
ATTENTION = "canvas attention"  # whose kernel ``auto`` uses only where a rule says that it wins
PROMPT = 4096  # tokens, unless told otherwise
FREED = 2**30  # bytes of freed buffers that MLX keeps for the next allocation, at most (``mlx_backend.residency``)
LIMIT = 18 * 10**9  # what the 4-bit 26B model may take at a prompt of 4,096 tokens


@dataclass(frozen=True)
class Subject:
    """A model to plan for: its names, its config, how its matrices are stored; ``width``: bytes of an activation."""

    name: str
    format: str
    config: ModelConfig
    encodings: dict[str, Encoding]
    width: int


def subject(model: str | None, bits: str | None) -> Subject:
    """The published 26B config by default; else the demo, a folder, a .gguf file or a config.json. Never a download.

    Args:
        bits: one of ``work.FORMATS``, 4bit by default, where only a config is known; else the files say it.

    Raises:
        OptionError: no such place, a format beside files that have one, or an unknown format.
    """
    form = {"4": "4bit", "8": "8bit", "16": "bf16"}.get(bits or "4bit", bits or "4bit")
    if form not in work.FORMATS:
        raise OptionError(f"--bits {bits} is unknown; choose {', '.join(work.FORMATS)}")
    place = PUBLISHED if model is None else hub.DEMO if model == "demo" else Path(model)
    if place.is_file() and place.suffix == ".json":
        config = ModelConfig.from_dict(read_json(place))
        return Subject(
            NAME if model is None else place.stem, form, config, work.formats(config, form), item_bytes(config)
        )
    if not place.is_dir() and not gguf_model.locate(place):
        raise OptionError(
            f"--model {model}: --plan downloads nothing; give a folder, a config.json, demo, or leave it out"
        )
    if bits is not None:
        raise OptionError(f"--bits {bits}: the files of {model} have a format already; leave it out")
    checkpoint = open_checkpoint(place)
    stored = {name: tensor.encoding for name, tensor in checkpoint.tensors.items()}
    width = width_of(checkpoint.config, checkpoint.dtype)
    return Subject(str(model), checkpoint.format, checkpoint.config, packed(stored), width)


def packed(stored: dict[str, Encoding]) -> dict[str, Encoding]:
    """What MLX multiplies as it is on disk; FP8 in blocks and dense tensors get the dtype of activations instead."""
    return {name: encoding for name, encoding in stored.items() if encoding.quantized and not encoding.block}


def record(about: Subject, load: Load, chip: Chip, here: int | None = None) -> dict[str, Any]:
    """Everything that ``--plan`` shows, as ``--json`` writes it. Bytes, operations, milliseconds.

    ``here``: bytes that a GPU of this machine may keep resident, where it has one.
    """
    plain, fused = work_ends.costs(load, False), work_ends.costs(load, True)
    level = work_ends.costs(replace(load, wide=True), False)
    without = fused | {ATTENTION: plain[ATTENTION]}
    rows = [row(part, plain[part], fused[part], chip) for part in work_ends.PARTS]
    both = {name: sum(part[name]["milliseconds"] for part in rows) for name in ("plain", "fused")}
    target = {
        "parts": list(work_ends.TARGET),
        "plain": work_ends.total(plain, work_ends.TARGET).nbytes,
        "fused": work_ends.total(fused, work_ends.TARGET).nbytes,
        "less": less(plain, fused),
        "less_at_equal_slices": less(level, fused),
        "less_with_plain_attention": less(plain, without),
        "less_with_both": less(level, without),
    }
    return {
        "model": about.name,
        "format": about.format,
        "chip": chip.describe(),
        "prompt_tokens": load.prompt,
        "canvas_length": load.config.canvas_length,
        "batch": load.batch,
        "self_conditioning": load.self_conditioning,
        "survivors": load.survivors if load.self_conditioning == "survivors" else None,
        "head_positions": load.read_rows // load.batch,
        "parts": rows,
        "total": row("step", work_ends.total(plain), work_ends.total(fused), chip, both),
        "vocabulary_and_attention": target,
        "prefix": {"copied": 0, "joining_would_move": work_ends.joined(load)},
        "memory": memory(load) | {"limit": limit(about), "here": here},
    }


def less(before: dict[str, Cost], after: dict[str, Cost]) -> float:
    """The share of vocabulary and attention traffic that is gone."""
    return 1 - work_ends.total(after, work_ends.TARGET).nbytes / work_ends.total(before, work_ends.TARGET).nbytes


def row(
    part: str, plain: Cost, fused: Cost, chip: Chip, milliseconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """One part both ways; of a sum of parts, ``milliseconds`` are added up, for parts run one after another."""

    def side(name: str, cost: Cost) -> dict[str, float]:
        floor = milliseconds[name] if milliseconds else chip.milliseconds(cost.nbytes, cost.operations)
        return {"bytes": cost.nbytes, "operations": cost.operations, "milliseconds": floor}

    saved = 1 - fused.nbytes / plain.nbytes if plain.nbytes else 0.0
    return {"part": part, "plain": side("plain", plain), "fused": side("fused", fused), "saved": saved}


def limit(about: Subject) -> int | None:
    """The goal that this project has set itself, of the model for which it has one."""
    return LIMIT if (about.name, about.format) == (NAME, "4bit") else None


def memory(load: Load) -> dict[str, Any]:
    """Behind the prompt, with kernels; ``macs``: for each size that is sold, in GB, what the GPU may keep, and whether
    what is in use fits; freed buffers give way."""
    held = memory_plan(load, fused=True)
    macs = [{"memory": size, "wired": wired(size), "fits": wired(size) >= held.total} for size in MEMORIES]
    smallest = next((mac["memory"] for mac in macs if mac["fits"]), None)
    chips = [chip.name for chip in CHIPS.values() if smallest is not None and chip.memory >= smallest]
    return held.describe() | {
        "plain_total": memory_plan(load, fused=False).total,
        "freed": FREED,
        "most": held.total + FREED,
        "macs": macs,
        "smallest": smallest,
        "chips": chips,
    }
