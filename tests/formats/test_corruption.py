"""Damaged checkpoints of every format: each is refused with one line, none is accepted, none ends in a traceback.

A damage is made where a file says something of itself: its length, its header, the names, shapes and dtypes in it, the
config beside it. A flipped bit in a weight is another number and nothing else; the manifest of a conversion finds it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.formats import open_checkpoint
from tests.formats.foreign import foreign
from tests.formats.quantized import quantized
from tests.tiny import checkpoint

KINDS: dict[str, Callable[[], Path]] = {"hf": checkpoint}
KINDS |= {kind: lambda kind=kind: quantized(kind) for kind in ("affine4", "mxfp4", "mxfp8", "nvfp4", "mixed")}
KINDS |= {
    kind: lambda kind=kind: foreign(kind)
    for kind in ("ct-fp8", "ct-nvfp4", "ct-int4", "ct-int8", "modelopt-nvfp4", "fp8-block")
}
SPARE = ("input_scale", "input_global_scale", "weight_shape")  # parts that no weight needs
EACH = 24  # damages per kind: 288 in all


def header(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put(path: Path, rows: dict, data: bytes) -> None:
    raw = json.dumps(rows).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def truncated(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    keep = draw.choice([0, 7, draw.randrange(size), size - 1])
    path.write_bytes(path.read_bytes()[:keep])
    return f"cut to {keep} bytes"


def longer(path: Path, draw: random.Random) -> str:
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 100)))
    return "bytes at the end"


def scrambled(path: Path, draw: random.Random) -> str:
    """One byte of what the header says of one tensor."""
    raw = bytearray(path.read_bytes())
    rows, _ = header(path)
    name = draw.choice([n for n in rows if n != "__metadata__"])
    start = raw.index(json.dumps(name).encode())
    entry = raw.index(b'"dtype"', start)
    at = draw.randrange(entry, raw.index(b"}", entry))
    old = raw[at]
    raw[at] = draw.choice([b for b in b'0123456789[]{},:"xU' if b != old])
    path.write_bytes(bytes(raw))
    return f"byte {at}: {chr(old)!r} became {chr(raw[at])!r}"


def lost(path: Path, draw: random.Random) -> str:
    """A tensor taken out properly, as a careless tool would."""
    rows, data = header(path)
    name = draw.choice([n for n in rows if n != "__metadata__" and not n.endswith(SPARE)])
    start, stop = rows.pop(name)["data_offsets"]
    for row in rows.values():
        if "data_offsets" in row and row["data_offsets"][0] >= stop:
            row["data_offsets"] = [offset - (stop - start) for offset in row["data_offsets"]]
    put(path, rows, data[:start] + data[stop:])
    return f"lost {name}"


def renamed(path: Path, draw: random.Random) -> str:
    rows, data = header(path)
    name = draw.choice([n for n in rows if n != "__metadata__"])
    new = draw.choice([name + "x", name.replace("layers.0", "layers.99") + "_", "other." + name, ""])
    put(path, {new if n == name else n: row for n, row in rows.items()}, data)
    return f"{name} became {new!r}"


def reshaped(path: Path, draw: random.Random) -> str:
    """Another shape with as many bytes."""
    rows, data = header(path)
    name = draw.choice([n for n, row in rows.items() if len(row.get("shape", ())) >= 2 and row["shape"][0] > 1])
    first, *rest, last = rows[name]["shape"]
    rows[name]["shape"] = [*rest, first * last] if rest else [1, first * last]
    put(path, rows, data)
    return f"reshaped {name}"


def retyped(path: Path, draw: random.Random) -> str:
    """Another dtype of the same width."""
    rows, data = header(path)
    pairs = {"F32": "I32", "BF16": "I16", "F16": "U16", "U32": "F32", "U8": "I8", "F8_E4M3": "I8", "I8": "BOOL"}
    pairs |= {"I32": "F32"}
    name = draw.choice([n for n, row in rows.items() if row.get("dtype") in pairs and not n.endswith(SPARE)])
    rows[name]["dtype"] = pairs[rows[name]["dtype"]]
    put(path, rows, data)
    return f"{name} became {rows[name]['dtype']}"


def misconfigured(path: Path, draw: random.Random) -> str:
    """One number of config.json that the weights contradict."""
    file = path.parent / "config.json"
    config = json.loads(file.read_text())
    key = draw.choice(["hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size", "intermediate_size"])
    config["text_config"][key] *= 2
    file.write_text(json.dumps(config))
    return f"{key} doubled"


DAMAGES = (truncated, longer, scrambled, lost, renamed, reshaped, retyped, misconfigured)


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_refused_in_one_line(kind: str, tmp_path: Path):
    whole = KINDS[kind]()
    open_checkpoint(whole)
    for index in range(EACH):
        draw, folder = random.Random(f"{kind} {index}"), tmp_path / str(index)
        shutil.copytree(whole, folder)
        path = draw.choice(sorted(folder.glob("*.safetensors")))
        what = DAMAGES[index % len(DAMAGES)](path, draw)
        with pytest.raises((UserError, FileNotFoundError)) as error:
            open_checkpoint(folder)
            pytest.fail(f"accepted: {what}")
        message = str(error.value)
        assert "\n" not in message and len(message) < 1000, (what, message)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["affine4", "mxfp4", "mxfp8", "nvfp4"])
def test_a_quantization_that_does_not_match_the_weights(kind: str, tmp_path: Path):
    """Bits, groups, modes and whole blocks changed in config.json: 5-bit codes must never be read as 4-bit ones."""
    whole = quantized(kind)
    base = json.loads((whole / "config.json").read_text())
    changes = [{"bits": bits} for bits in (2, 3, 5, 7, 16, None, "4", -1)]
    changes += [{"group_size": size} for size in (16, 128, 0, 63, "64")]
    changes += [{"mode": mode} for mode in ("affine", "mxfp4", "mxfp8", "nvfp4", "nf4", 3)]
    tried = 0
    for change in changes:
        config = json.loads(json.dumps(base))
        block = config["quantization"] | change
        if block == config["quantization"] or (change == {"bits": None} and block["mode"] != "affine"):
            continue  # the other modes have one width, which need not be said
        config["quantization"] = config["quantization_config"] = block
        folder = tmp_path / str(tried)
        shutil.copytree(whole, folder)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as error:
            open_checkpoint(folder)
            pytest.fail(f"accepted: {change}")
        assert "\n" not in str(error.value)
        tried += 1
    assert tried >= 15
