"""Damaged GGUF files: one line each, never a traceback, a hang, an allocation as a header claims it, or wrong bytes."""

from __future__ import annotations

import functools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import CheckpointError, UserError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.gguf_file import GGUFFile, open_gguf
from tests.formats import gguf_files as files

SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HUGE = (2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@functools.cache
def small() -> bytes:
    """A file with a pair of every type and two tensors, of floats and of blocks."""
    path = Path(files._home().name) / "small.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_string("a.text", "some text")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["one", "two", "three"])
    writer.add_tensor("first", np.arange(24, dtype=np.float32).reshape(4, 6))
    writer.add_tensor("other", gguf.quantize(np.ones((2, 64), np.float32), Type.Q8_0), raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def at(key: str, skip: int = 0) -> int:
    """Behind a name in the file."""
    return small().index(key.encode()) + len(key) + skip


def put(where: Callable[[], int], code: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        raw = struct.pack(f"<{code}", value)
        return data[: where()] + raw + data[where() + len(raw) :]

    return change


def refused(path: Path, data: bytes, *parts: str) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message and str(path) in message and all(part in message for part in parts), message
    assert peak < 5e6, f"{peak:,} bytes for a file of {len(data):,}"


def test_the_small_file_is_whole(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(small())
    opened = open_gguf(tmp_path / "a.gguf")
    assert (
        opened.fields["a.number"] == 7 and opened.fields["a.numbers"] == (1, 2, 3) and opened.fields["a.truth"] is True
    )
    assert opened.fields["a.text"] == "some text" and "a.texts" not in opened.fields
    assert np.array_equal(opened.tensors["first"].read(), np.arange(24).reshape(4, 6))
    assert opened.tensors["other"].shape == (2, 68)


# From the end of a tensor's name: axes u32, sizes u64 each, type u32, offset u64.
FIRST, OTHER = functools.partial(at, "first"), functools.partial(at, "other")
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "empty": (lambda d: b"", ("truncated",)),
    "only the magic": (lambda d: d[:4], ("truncated",)),
    "no counts": (lambda d: d[:20], ("truncated",)),
    "a web page": (lambda d: b"<html>404 Not Found</html>" * 100, ("not a GGUF file",)),
    "safetensors": (lambda d: (100).to_bytes(8, "little") + b'{"a": {}}' * 30, ("not a GGUF file",)),
    "version 1": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], ("version 1",)),
    "version 99": (lambda d: d[:4] + struct.pack("<I", 99) + d[8:], ("version 99",)),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], ("big-endian",)),
    "cut in the data": (lambda d: d[:-40], ("truncated",)),
    "a rest": (lambda d: d + bytes(100), ("after its last tensor",)),
    "fewer tensors than there are": (put(lambda: 8, "Q", 1), ("after its last tensor",)),
    "no tensors": (put(lambda: 8, "Q", 0), ("after its last tensor",)),
    "more tensors than there are": (put(lambda: 8, "Q", 3), ()),
    "fewer pairs than there are": (put(lambda: 16, "Q", 6), ()),
    "more pairs than there are": (put(lambda: 16, "Q", 8), ()),
    "a key twice": (lambda d: d.replace(b"a.truth", b"a.float"), ("a.float is stored twice",)),
    "a tensor twice": (lambda d: d.replace(b"other", b"first"), ("first is stored twice",)),
    "a key of no letters": (put(lambda: at("GGUF") + 20, "Q", 0), ("a key is called ''",)),
    "a key that is no text": (lambda d: d.replace(b"a.float", b"\xff\xff\xff\xff\xff\xff\xff"), ("UTF-8",)),
    "a key with a line break": (lambda d: d.replace(b"a.float", b"a\nfloat"), ("a key is called",)),
    "a text that is none": (lambda d: d.replace(b"some text", b"some\xfftext"), ("UTF-8",)),
    "an unknown type of pair": (put(lambda: at("a.float"), "I", 13), ("type 13",)),
    "an array of arrays": (put(lambda: at("a.numbers", 4), "I", 9), ("array of type 9",)),
    "an array of nothing known": (put(lambda: at("a.numbers", 4), "I", 77), ("array of type 77",)),
    "no axes": (put(FIRST, "I", 0), ("first has 0 axes",)),
    "five axes": (put(FIRST, "I", 5), ("first has 5 axes",)),
    "4 billion axes": (put(FIRST, "I", 2**32 - 1), ("axes",)),
    "an axis of nothing": (put(lambda: FIRST() + 4, "Q", 0), ("(4, 0)",)),
    "an axis too long": (put(lambda: FIRST() + 4, "Q", 7), ("overlaps first",)),
    "an axis too short": (put(lambda: FIRST() + 12, "Q", 2), ("leaves a gap",)),
    "half a block": (put(lambda: OTHER() + 4, "Q", 48), ("other is Q8_0 of shape (2, 48)",)),
    "a removed type": (put(lambda: FIRST() + 20, "I", 4), ("type 4",)),
    "an unknown type": (put(lambda: FIRST() + 20, "I", 2**32 - 1), ("does not read",)),
    "another type": (put(lambda: FIRST() + 20, "I", 1), ("leaves a gap after first",)),
    "an offset into another": (put(lambda: OTHER() + 24, "Q", 64), ("other overlaps first",)),
    "an offset that is not aligned": (put(lambda: OTHER() + 24, "Q", 97), ("leaves a gap",)),
    "the same offset": (put(lambda: OTHER() + 24, "Q", 0), ("overlaps",)),
    "an offset beyond the file": (put(lambda: OTHER() + 24, "Q", 1 << 20), ("gap",)),
}
DAMAGE |= {f"{n} tensors": (put(lambda: 8, "Q", n), ("tensors",)) for n in HUGE}
DAMAGE |= {f"{n} pairs": (put(lambda: 16, "Q", n), ("pairs",)) for n in HUGE}
DAMAGE |= {f"a name of {n}": (put(lambda: OTHER() - 13, "Q", n), ("claims",)) for n in HUGE}
DAMAGE |= {f"a text of {n}": (put(lambda: at("a.text", 4), "Q", n), ("claims",)) for n in HUGE}
DAMAGE |= {f"{n} numbers": (put(lambda: at("a.numbers", 8), "Q", n), ("array of",)) for n in HUGE}
DAMAGE |= {f"{n} texts": (put(lambda: at("a.texts", 8), "Q", n), ("array of",)) for n in HUGE}
DAMAGE |= {f"an axis of {n}": (put(lambda: FIRST() + 4, "Q", n), ()) for n in HUGE}
DAMAGE |= {f"an offset of {n}": (put(lambda: OTHER() + 24, "Q", n), ()) for n in HUGE}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(kind: str, tmp_path: Path):
    change, parts = DAMAGE[kind]
    refused(tmp_path / "a.gguf", change(small()), *parts)


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**31])
def test_an_alignment_that_is_none(alignment: int, tmp_path: Path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.add_uint32("general.alignment", alignment)
    writer.add_tensor("a", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, path.read_bytes(), f"general.alignment is {alignment}")


def test_cut_anywhere(tmp_path: Path):
    data = small()
    for size in range(len(data) - 32):
        refused(tmp_path / "a.gguf", data[:size], "truncated")


def sound(opened: GGUFFile, size: int) -> None:
    """What was accepted lies within the file, in whole rows."""
    for tensor in opened.tensors.values():
        assert tensor.start + tensor.nbytes <= size
        assert tensor.read().nbytes == tensor.nbytes


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(small()) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_changed_anywhere(tmp_path: Path, changes: list[tuple[int, int]]):
    data = bytearray(small())
    for place, value in changes:
        data[place] = value
    try_open(tmp_path / "a.gguf", bytes(data))


@SETTINGS
@given(st.integers(0, len(small())), st.integers(0, 64), st.binary(max_size=64))
def test_a_stretch_replaced(tmp_path: Path, start: int, length: int, new: bytes):
    try_open(tmp_path / "a.gguf", small()[:start] + new + small()[start + length :])


def try_open(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        opened = open_gguf(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        sound(opened, len(data))


@SETTINGS
@given(st.data())
def test_a_whole_checkpoint_with_a_damaged_header(tmp_path: Path, data: st.DataObject):
    """Whatever the header says: the tensors are those of the model, at places within the file, or it is refused."""
    raw = bytearray(files.model("Q8_0").read_bytes())
    end = open_gguf(files.model("Q8_0")).tensors["token_embd.weight"].start
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(raw))
    try:
        opened = open_checkpoint(path, sidecars=files.source())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert set(opened.tensors) == set(opened.table)
        assert all(stored.read(0, 1).shape[0] == 1 for stored in opened.tensors.values())


def test_numbers_of_many_texts_are_stepped_over_quickly(tmp_path: Path):
    """A vocabulary of the real size; the gguf package's own reader takes seconds for it."""
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, files.ARCH)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(262_144)])
    writer.add_tensor("a", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tracemalloc.start()
    assert list(open_gguf(path).tensors) == ["a"]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
