"""The plan of a model on a Mac, before anything is downloaded: the work of a step by part, and the memory it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..config import ModelConfig
from ..errors import ConfigError, OptionError
from ..formats import gguf_model, open_checkpoint
from ..formats.encoding import Encoding
from ..json_file import read_json
from ..memory import width_of
from ..tensors import item_bytes
from . import work, work_ends
from .chips import CHIPS, MEMORIES, Chip, smallest, wired
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
        ConfigError: a config of another model; names the file.
    """
    asked = "4bit" if bits is None else bits
    form = {"4": "4bit", "8": "8bit", "16": "bf16"}.get(asked, asked)
    if form not in work.FORMATS:
        raise OptionError(f"--bits {bits!r} is unknown; choose {', '.join(work.FORMATS)}")
    place = PUBLISHED if model is None else hub.DEMO if model == "demo" else Path(model)
    file = None if model == "" else config_alone(place)
    if file is not None:
        config = config_of(file)
        name = NAME if model is None else place.resolve().name if place.is_dir() else place.stem
        return Subject(name, form, config, work.formats(config, form), item_bytes(config))
    if model == "" or (not place.is_dir() and not gguf_model.locate(place)):
        raise OptionError(
            f"--model {model!r}: --plan downloads nothing; give a folder, a config.json, demo, or leave it out"
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


def config_alone(place: Path) -> Path | None:
    """The config.json that is all there is of a model: a file, or in a folder without weights."""
    if place.is_file() and place.suffix == ".json":
        return place
    file = place / "config.json"
    return file if file.is_file() and not gguf_model.locate(place) and not any(place.glob("*.safetensors")) else None


def config_of(file: Path) -> ModelConfig:
    data = read_json(file)
    try:
        return ModelConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json", str(file), 1)) from error


def check_context(config: ModelConfig, prompt: int, blocks: int | None = None) -> None:
    """Whether a prompt of so many tokens has room for ``blocks`` canvases; for one, where only that is planned.

    Raises:
        OptionError: it has not.
    """
    context, canvas = config.text.max_position_embeddings, config.canvas_length
    if prompt + (blocks or 1) * canvas > context:
        asked = f"a canvas of {canvas:,}" if blocks is None else f"--blocks {blocks:,} of {canvas:,} each"
        raise OptionError(
            f"--prompt-tokens {prompt:,} and {asked} are too many; the context holds {context:,}: ask for fewer"
        )


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
        "memory": memory(load) | {"limit": limit(about, load), "here": here},
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


def limit(about: Subject, load: Load) -> int | None:
    """The goal that this project has set itself, where it has one."""
    ours = (about.name, about.format, load.batch) == (NAME, "4bit", 1) and load.prompt <= PROMPT
    return LIMIT if ours else None


def memory(load: Load) -> dict[str, Any]:
    """Behind the prompt, of the larger of both versions, as ``load`` judges it as long as no kernel is proven.

    ``macs``: for each size that is sold, in GB, what the GPU may keep, and whether what is in use fits; freed buffers
    give way.
    """
    plain, fused = memory_plan(load, fused=False), memory_plan(load, fused=True)
    held = max(plain, fused, key=lambda plan: plan.total)
    least = smallest(held.total)
    return held.describe() | {
        "plain_total": plain.total,
        "fused_total": fused.total,
        "freed": FREED,
        "most": held.total + FREED,
        "macs": [{"memory": size, "wired": wired(size), "fits": wired(size) >= held.total} for size in MEMORIES],
        "smallest": least,
        "smallest_fused": smallest(fused.total),
        "chips": [chip.name for chip in CHIPS.values() if least is not None and chip.memory >= least],
    }
