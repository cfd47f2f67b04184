"""One conversion from start to end: shards, the files beside them, a strict look at the result, config.json last.

No loader accepts the folder before it has a config.json, so whatever goes wrong before leaves nothing that could be
taken for a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats.assemble import assemble
from mlx_diffgemma.formats.checkpoint import build
from mlx_diffgemma.formats.detect import detect
from mlx_diffgemma.formats.safetensors import open_file
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tensors import tensor_table

from . import manifest, sidecars
from .container import Done, Progress
from .digest import Background, facts, sha256
from .edges import Error, Errors
from .output import JOURNAL, Journal, OutputError, check_free, check_room, claimed, json_bytes, put, sync
from .plan import Plan, Shard
from .writer import INDEX, PART, index, write_shard

CONFIG = "config.json"
SLACK = 50_000_000  # bytes for what is not weights


def convert(
    plan: Plan, out: Path, progress: Progress, *, resume: bool = False, sidecars_from: Path | None = None
) -> Done:
    """Write ``plan`` to ``out``.

    Raises:
        OptionError: ``out`` is not free, or holds an interrupted conversion of another kind.
        OutputError: it cannot be written to.
        CheckpointError: the source is damaged.
    """
    started = time.perf_counter()
    beside = sidecars.find(plan.checkpoint.folder, sidecars_from)
    config = json_bytes(plan.target.config(source_config(plan), plan.encodings))
    with _one_line(out):
        check_free(out, plan.checkpoint.folder, resume=resume)
        journal = Journal(out, fingerprint(plan))
        check_room(out, sum(shard.nbytes for shard in plan.shards if shard.name not in journal.shards) + SLACK)
        out.mkdir(parents=True, exist_ok=True)
        with claimed(out), _swept(out, plan):
            (out / CONFIG).unlink(missing_ok=True)
            left = [shard for shard in plan.shards if not _finished(out, shard, journal, progress)]
            journal.write()
            errors = _fill(plan, left, out, journal, progress, beside, config)
            (out / (CONFIG + PART)).rename(out / CONFIG)
            journal.close()
            sync(out)
    missing = sidecars.absent(beside, plan.text_only)
    return Done((out,), plan, errors, time.perf_counter() - started, tuple(missing))


def _fill(
    plan: Plan,
    left: list[Shard],
    out: Path,
    journal: Journal,
    progress: Progress,
    beside: dict[str, Path],
    config: bytes,
) -> Errors:
    """Everything but the last step: the config still has a name that no loader looks for."""
    with Background("inputs") as reading, Background("outputs", patient=True) as finishing:
        inputs = reading.hashes(plan.checkpoint.files, progress)
        _write(plan, left, out, journal, progress, finishing)
        put(out / INDEX, json_bytes(index(plan)))
        sidecars.copy(beside, out)
        look(plan, out, config)
        put(out / (CONFIG + PART), config)
        outputs = {shard.name: _facts(journal, shard) for shard in plan.shards}
        outputs |= {name: facts(out / name) for name in (INDEX, *sorted(beside))}
        outputs[CONFIG] = facts(out / (CONFIG + PART))
        errors = _errors(journal)
        put(out / manifest.MANIFEST, json_bytes(manifest.build(plan, errors, inputs.result(), outputs)))
    sync(out)
    return errors


def to_read(plan: Plan) -> int:
    """Bytes: every tensor to convert it, every file to hash it."""
    return plan.source_bytes + sum(path.stat().st_size for path in plan.checkpoint.files)


def source_config(plan: Plan) -> Mapping[str, Any]:
    """The source's config.json, without vision where that is dropped."""
    config = read_json(plan.checkpoint.folder / CONFIG)
    return {**config, "vision_config": None} if plan.text_only else config


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in plan.checkpoint.files}
    return {
        "library": manifest.library(),
        "source": files,
        "target": plan.target.name,
        "recipe": plan.recipe.resolved(),
        "shards": {shard.name: [len(shard.items), shard.nbytes] for shard in plan.shards},
    }


def look(plan: Plan, out: Path, config: bytes) -> None:
    """Open what was written as a loader would, with the config that it is about to get.

    Raises:
        OutputError: it is not exactly what the plan says. That would be a mistake of this library.
    """
    data = json.loads(config)
    files = [open_file(out / shard.name) for shard in plan.shards]
    parts = [file.tensor(name) for file in files for name in file.entries]
    dialect = detect(out, data, [part.name for part in parts])
    parsed = ModelConfig.from_dict(data)
    found = build(out, parsed, dialect, assemble(parts, tensor_table(parsed), dialect), [file.path for file in files])
    for item in plan.items:
        stored = found.tensors[item.row.name]
        if stored.encoding != item.encoding:
            raise OutputError(f"{out}: {item.row.name} was written as {item.encoding} and reads as {stored.encoding}")
    if set(found.tensors) != {item.row.name for item in plan.items}:
        raise OutputError(f"{out} holds other tensors than were planned")


def _write(
    plan: Plan, left: list[Shard], out: Path, journal: Journal, progress: Progress, finishing: Background
) -> None:
    ends: list[Future[None]] = []
    for shard in left:
        errors = write_shard(plan, shard, out, progress)
        ends.append(finishing.pool.submit(_finish, out, shard, journal, errors))
        for end in ends:  # a failure shows before the next shard is begun, not after the last
            if end.done():
                end.result()
    for end in ends:
        end.result()


def _finish(out: Path, shard: Shard, journal: Journal, errors: Errors) -> None:
    """Synced, hashed, under its own name, and in the journal: in this order."""
    part = out / (shard.name + PART)
    sync(part)
    record: dict[str, Any] = dict(facts(part))
    part.rename(out / shard.name)
    sync(out)
    journal.add(shard.name, record | {"errors": {name: [e.lost, e.total] for name, e in errors.items()}})


def _finished(out: Path, shard: Shard, journal: Journal, progress: Progress) -> bool:
    """Whether a shard of an interrupted conversion is whole; one that is not will be written again."""
    record, path = journal.shards.get(shard.name), out / shard.name
    if record and path.is_file() and path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]:
        progress.advance(sum(item.stored.nbytes for item in shard.items))
        return True
    journal.remove(shard.name)
    path.unlink(missing_ok=True)
    return False


def _facts(journal: Journal, shard: Shard) -> dict[str, Any]:
    return {key: journal.shards[shard.name][key] for key in ("bytes", "sha256")}


def _errors(journal: Journal) -> Errors:
    return {name: Error(*pair) for record in journal.shards.values() for name, pair in record["errors"].items()}


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """What the disk says, in words of this program."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of our own, which says more
            raise
        where = error.filename or out
        again = "; what is finished is kept, --resume continues" if (out / JOURNAL).exists() else ""
        raise OutputError(f"{where}: {error.strerror or error}{again}") from error


@contextmanager
def _swept(out: Path, plan: Plan) -> Iterator[None]:
    """No unfinished file is left of a conversion that fails: on a full disk they would be in the way."""
    whole = False
    try:
        yield
        whole = True
    finally:
        for shard in () if whole else plan.shards:
            (out / (shard.name + PART)).unlink(missing_ok=True)
