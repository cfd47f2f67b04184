"""One safetensors file: values bit for bit, no data read on opening, and every damaged or hostile header refused."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats.safetensors import open_file
from tests.formats.saved import entry, written


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_file(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    return message


def test_values_of_every_dtype_come_back_bit_for_bit(tmp_path: Path):
    """A detour through float32 would keep the values of bfloat16 and lose the payload of its nan."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    kinds = (torch.bfloat16, torch.float16, torch.int16, torch.uint16, torch.uint8, torch.int8, torch.float32)
    kinds += (torch.int32, torch.uint32, torch.int64, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    save_file({str(kind): bits.view(kind).clone() for kind in kinds}, tmp_path / "a.safetensors")
    file = open_file(tmp_path / "a.safetensors")
    for kind in kinds:
        assert file.read(str(kind)).tobytes() == bits.numpy().tobytes()
    assert file.read("torch.bfloat16").dtype == ml_dtypes.bfloat16
    assert file.read("torch.float32").shape == (2**15,)


def test_shapes_scalars_empty_tensors_and_odd_offsets(tmp_path: Path):
    """Tensors start wherever the one before ended; a view must not need alignment."""
    header = {
        "byte": entry([3], 0, "U8", 1),
        "table": entry([2, 3], 3),
        "scalar": entry([], 27),
        "empty": entry([0, 4], 31),
        "__metadata__": {"format": "pt"},
    }
    values = np.arange(7, dtype=np.float32)
    file = open_file(written(tmp_path / "a.safetensors", header, b"abc" + values.tobytes()))
    assert file.metadata == {"format": "pt"}
    assert (file.read("table") == values[:6].reshape(2, 3)).all()
    assert file.read("scalar").shape == () and file.read("scalar") == 6
    assert file.read("empty").shape == (0, 4)
    with pytest.raises(ValueError, match="read-only"):
        file.read("table")[0, 0] = 1


def test_opening_reads_no_data(tmp_path: Path):
    """A terabyte that exists only as a hole: reading it, or copying one tensor, would not end."""
    rows = 2**40 // 8
    path = written(tmp_path / "a.safetensors", {"first": entry([rows], 0), "second": entry([rows], 4 * rows)})
    start = path.stat().st_size
    with path.open("r+b") as file:
        try:
            file.truncate(start + 8 * rows)
        except OSError:  # a file system without such sizes; a gigabyte is a hole everywhere
            rows = 2**27
            written(path, {"first": entry([rows], 0), "second": entry([rows], 4 * rows)})
            with path.open("r+b") as again:
                again.truncate(path.stat().st_size + 8 * rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = open_file(path).read("second")
    assert tensor.shape == (rows,) and tensor[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


WHOLE = entry([4], 0)
HOSTILE: dict[str, tuple[Any, str]] = {
    "a list": ([1], "list"),
    "a text": ("x", "str"),
    "a number": (3, "int"),
    "not JSON": (b"{'a': 1}", "damaged header"),
    "not text": (b"\xff\xfe{}", "damaged header"),
    "nested too deeply": (b"[" * 200_000, "damaged header"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "damaged header"),
    "metadata a list": ({"__metadata__": [1], "a": WHOLE}, "__metadata__"),
    "entry a list": ({"a": [1, 2]}, "'a'"),
    "entry null": ({"a": None}, "'a'"),
    "entry a text": ({"a": "F32"}, "'a'"),
    "name of two lines": ({"a\nb": WHOLE}, r"a\nb"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "None"),
    "unknown dtype": ({"a": WHOLE | {"dtype": "F4"}}, "'F4'"),
    "dtype a list": ({"a": WHOLE | {"dtype": ["F32"]}}, "['F32']"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "shape None"),
    "shape a number": ({"a": WHOLE | {"shape": 4}}, "shape 4"),
    "shape negative": ({"a": WHOLE | {"shape": [-2, -2]}}, "[-2, -2]"),
    "shape of fractions": ({"a": WHOLE | {"shape": [4.0]}}, "[4.0]"),
    "shape of truths": ({"a": WHOLE | {"shape": [True, 4]}}, "[True, 4]"),
    "shape huge": ({"a": WHOLE | {"shape": [2**62, 2**62]}}, "16 bytes"),
    "shape beyond any number": ({"a": WHOLE | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, "10000"),
    "shape wraps around": ({"a": WHOLE | {"shape": [2**62 + 1, 4]}}, "16 bytes"),
    "shape too small": ({"a": WHOLE | {"shape": [3]}}, "16 bytes"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, "data_offsets None"),
    "one offset": ({"a": WHOLE | {"data_offsets": [16]}}, "[16]"),
    "offsets a text": ({"a": WHOLE | {"data_offsets": "0-16"}}, "'0-16'"),
    "offsets of fractions": ({"a": WHOLE | {"data_offsets": [0, 16.0]}}, "16.0"),
    "offsets negative": ({"a": WHOLE | {"data_offsets": [-16, 0]}}, "[-16, 0]"),
    "offsets into the header": ({"a": WHOLE | {"data_offsets": [-8, 8]}}, "[-8, 8]"),
    "offsets crossed": ({"a": WHOLE | {"data_offsets": [16, 0]}}, "[16, 0]"),
    "offsets beyond the file": ({"a": WHOLE | {"data_offsets": [16, 32]}}, "gap"),
    "offsets overlap": ({"a": WHOLE, "b": entry([2], 8)}, "b overlaps a"),
    "offsets equal": ({"a": WHOLE, "b": WHOLE}, "overlaps"),
    "a gap": ({"a": entry([2], 0), "b": entry([1], 12)}, "b leaves a gap after a"),
    "a rest": ({"a": entry([3], 0)}, "4 bytes after"),
    "cut in the data": ({"a": entry([5], 0)}, "truncated"),
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(WHOLE).encode(),) * 2), "'a' is stored twice"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header(kind: str, tmp_path: Path):
    """Never a traceback, never a tensor made of the wrong bytes."""
    header, part = HOSTILE[kind]
    assert part in refused(written(tmp_path / "a.safetensors", header, bytes(16)))


@pytest.mark.parametrize("length", [10**4, 10**9, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path):
    """The length is the first thing an attacker writes: it must not become an allocation."""
    assert "truncated" in refused(written(tmp_path / "a.safetensors", {}, bytes(100), length=length))


@pytest.mark.parametrize("size", [0, 7, 8, 60])
def test_a_file_cut_in_its_header(size: int, tmp_path: Path):
    path = written(tmp_path / "a.safetensors", {"a": WHOLE}, bytes(16))
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated" in refused(path)


def test_garbage(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"<html>404 Not Found</html>" * 100)
    assert "not a safetensors file" in refused(path)
