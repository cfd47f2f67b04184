"""GGUF as llama.cpp #24423 and Unsloth have it: one file for the text model, one (mmproj) for the vision tower.

``--out`` is a .gguf file to be, for programs that need nothing else, or a folder: the files, and beside them config and
tokenizer, so that this library loads it. ``gguf_writer`` makes the files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats.checkpoint import build
from mlx_diffgemma.formats.encoding import Encoded, Encoding
from mlx_diffgemma.formats.gguf_file import FLOATS, GGUFTensor
from mlx_diffgemma.formats.gguf_model import Files, read
from mlx_diffgemma.formats.gguf_names import PATCHES, POSITIONS, ROPE, gguf_name
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import VISION, Tensor

from . import manifest, sidecars
from .container import Done, Progress
from .dialect import googles
from .digest import Background, facts
from .edges import Errors
from .gguf_pairs import model_pairs, projector_pairs, rope_frequencies
from .gguf_tokenizer import tokenizer_pairs
from .gguf_writer import as_written, info_of, kind_of, one_line, write_file
from .output import OutputError, check_free, check_room, claimed, json_bytes, put, sync
from .plan import Item, Plan
from .recipes import Q8_0
from .run import CONFIG, SLACK, source_config
from .target import Output
from .writer import PART


class GGUF:
    """As a target it says what GGUF can hold and how large that is; as a container it writes.

    Encodings of 8-bit affine codes in groups of 32 mean Q8_0, which has float16 scales and no bias. Norms, routers and
    scalars are float32, as llama.cpp keeps them.
    """

    name: str = "gguf"
    metadata: Mapping[str, str] = {}
    names: Mapping[str, str] = {str(Q8_0): "Q8_0"}

    def holds(self, row: Tensor, encoding: Encoding) -> bool:
        if not encoding.quantized:
            wide = len(row.shape) == 1 or row.role in ("norm", "router", "scalar") or row.name in (PATCHES, POSITIONS)
            return encoding.dtype == "float32" or not wide
        matrix = row.role == "experts" or (len(row.shape) == 2 and row.name.endswith(".weight"))
        known = str(encoding) in self.names or encoding.mode == "mxfp4"
        return matrix and row.role not in VISION and known and encoding.fits(row.shape)

    def outputs(self, row: Tensor, encoding: Encoding) -> list[Output]:
        info = info_of(row, encoding)
        if info.kind in FLOATS:
            return [Output(info.name, info.shape, FLOATS[info.kind])]
        return [Output(info.name, (*info.shape[:-1], info.row), np.dtype(np.uint8))]

    def emit(self, row: Tensor, start: int, encoded: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
        yield gguf_name(row.name), start, as_written(row, encoded, kind_of(encoded.encoding))[0]

    def config(self, config: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
        """For the folder of the file; GGUF itself has none. What is float32 in every file says nothing of the model."""
        narrow = {encoding.dtype for encoding in encodings.values() if not encoding.quantized} - {"float32"}
        return googles(config, min(narrow, default=ModelConfig.from_dict(config).dtype))

    def write(self, plan: Plan, path: Path, progress: Progress) -> Done:
        """To ``path`` where it ends in .gguf, else to a folder of that name.

        Raises:
            OptionError: something is there already.
            FileNotFoundError, CheckpointError: there is no tokenizer, or the source is damaged.
            OutputError: it cannot be written.
        """
        started, alone = time.perf_counter(), path.suffix.lower() == ".gguf"
        absent: list[str] = []
        with one_line(path):
            if alone:
                check_room(path.parent, plan.nbytes + SLACK)
                paths, errors = write_files(plan, path, progress)
            else:
                beside = sidecars.find(plan.checkpoint.folder)
                paths, errors = [path], _write_folder(plan, path, beside, progress)
                absent = sidecars.absent(beside, plan.text_only)
        return Done(tuple(paths), plan, errors, time.perf_counter() - started, tuple(absent))


def write_files(plan: Plan, path: Path, progress: Progress, aside: Path | None = None) -> tuple[list[Path], Errors]:
    """The model to ``path``, and the vision tower to ``aside`` or an mmproj file beside it; either all or none."""
    folder, config = plan.checkpoint.folder, plan.checkpoint.config
    (text, vision), name = parted(plan), origin_name(plan)
    tokenizer = tokenizer_pairs(folder, config.text.vocab_size)
    pairs = model_pairs(name, main_kind(text), config, plan.checkpoint.generation) | tokenizer
    files = [(path, pairs, text, {ROPE: rope_frequencies(config.text)})]
    if vision:
        settings = folder / "processor_config.json"
        processor = read_json(settings) if settings.is_file() else {}
        pairs = projector_pairs(name, main_kind(vision), config, read_json(folder / CONFIG), processor)
        files.append((aside or path.with_name(f"mmproj-{path.name}"), pairs, vision, {}))
    paths, errors, whole = [place for place, *_ in files], Errors(), False
    for place in paths:
        if place.exists():
            raise OptionError(f"--out {str(place)!r} is there already; give another name")
    try:
        for place, pairs, items, extra in files:
            errors |= write_file(place, pairs, items, extra, progress)
        look(plan, paths)
        whole = True
    finally:
        for place in paths if not whole else ():
            place.unlink(missing_ok=True)
    return paths, errors


def parted(plan: Plan) -> tuple[list[Item], list[Item]]:
    """The text model and the vision tower."""
    vision = [item for item in plan.items if item.row.role in VISION]
    return [item for item in plan.items if item.row.role not in VISION], vision


def origin_name(plan: Plan) -> str:
    return manifest.origin(plan.checkpoint).rpartition("/")[2]


def main_kind(items: Sequence[Item]) -> str:
    """The type of most values."""
    sizes: Counter[str] = Counter()
    for item in items:
        sizes[kind_of(item.encoding)] += item.row.size
    return sizes.most_common(1)[0][0]


def look(plan: Plan, paths: Sequence[Path]) -> None:
    """Open what was written as a loader would.

    Raises:
        OutputError: it is not exactly what the plan says. That would be a mistake of this library.
    """
    config = plan.checkpoint.config
    config = replace(config, vision=None) if plan.text_only else config
    files = Files((paths[0],), paths[1] if len(paths) > 1 else None)
    dialect, found = read(files, config)
    opened = build(plan.checkpoint.folder, config, dialect, found, list(paths), paths[0])
    kinds = {name: part.kind for name, s in opened.tensors.items() for part in s.parts if isinstance(part, GGUFTensor)}
    if kinds != {item.row.name: kind_of(item.encoding) for item in plan.items}:
        raise OutputError(f"{paths[0]} holds other tensors than were planned")


def _write_folder(plan: Plan, out: Path, beside: Mapping[str, Path], progress: Progress) -> Errors:
    """Files, sidecars and manifest; config.json last, for nothing loads the folder before it has one."""
    check_free(out, plan.checkpoint.folder, resume=False)
    check_room(out, plan.nbytes + SLACK)
    config = json_bytes(plan.target.config(source_config(plan), plan.encodings))
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out), Background("inputs") as reading:
        inputs = reading.pool.submit(lambda: {p.name: facts(p, reading.stop) for p in plan.checkpoint.files})
        text, vision = parted(plan)
        path, aside = (out / f"{origin_name(plan)}-{main_kind(items or text)}.gguf" for items in (text, vision))
        paths, errors = write_files(plan, path, progress, aside.with_name(f"mmproj-{aside.name}"))
        sidecars.copy(beside, out)
        put(out / (CONFIG + PART), config)
        outputs = {path.name: facts(path) for path in [*paths, *(out / name for name in sorted(beside))]}
        outputs[CONFIG] = facts(out / (CONFIG + PART))
        put(out / manifest.MANIFEST, json_bytes(manifest.build(plan, errors, inputs.result(), outputs)))
        (out / (CONFIG + PART)).rename(out / CONFIG)
        sync(out)
    return errors
