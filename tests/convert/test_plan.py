"""The plan: what it predicts is what is written, and what it warns of is so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from convert import plan
from convert.command import main
from convert.edges import Error, carries, convert, finite
from convert.plan import Plan
from convert.recipes import KEEP, RECIPES, parse_encoding, recipe
from convert.targets import target
from convert.writer import layout
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import DTYPES, Encoded, dense, encode
from mlx_diffgemma.hub import DEMO
from tests.convert.cases import contents, converted, run, same_numbers, source

LAYER = "model.decoder.layers"


def planned(folder: Path, to: str = "mlx", name: str | None = None, **options) -> Plan:
    return plan.make(open_checkpoint(folder), target(to), recipe(name), **options)


@pytest.mark.parametrize("name", [None, *(name for name in RECIPES if "fp8" not in name or name == "mxfp8")])
def test_predicted_bytes_are_written(name: str | None, tmp_path: Path):
    predicted = planned(source(), name=name)
    out = run(source(), tmp_path / "out", *(["--recipe", name] if name else []))
    found = open_checkpoint(out)
    assert found.nbytes == predicted.nbytes
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": predicted.nbytes, "total_parameters": predicted.values}
    assert predicted.values == sum(row.size for row in found.table.values())
    (shard,) = predicted.shards
    assert (out / shard.name).stat().st_size == layout(shard, dict(predicted.target.metadata)).nbytes


def test_the_dry_run_says_every_tensor_and_writes_nothing(capsys):
    before = contents(DEMO)
    assert main(["demo", "--recipe", "experts4", "--dry-run"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("model.")}
    assert rows.keys() == open_checkpoint(DEMO).table.keys()
    bank = rows[f"{LAYER}.0.experts.gate_up_proj"].split()
    assert (
        bank == f"{LAYER}.0.experts.gate_up_proj 8 x 128 x 128 bfloat16 affine 4-bit g64 quantize 73,728 4.50".split()
    )
    assert lines[-1] == "nothing was written" and f"{planned(DEMO, name='experts4').bits():.2f} per weight" in text
    assert contents(DEMO) == before


def test_files_hold_at_most_the_shard_size(tmp_path: Path):
    out = run(source(), tmp_path / "out", "--recipe", "experts4", "--shard-size", "60kB")
    files = sorted(out.glob("*.safetensors"))
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert [path.name for path in files] == names and len(files) > 5
    shards = planned(source(), name="experts4", shard_size=60_000).shards
    assert all(shard.nbytes <= 60_000 or len(shard.items) == 1 for shard in shards)
    assert any(shard.nbytes > 60_000 for shard in shards), "one tensor that is larger by itself"
    same_numbers(converted("experts4"), out)


def test_every_tensor_is_aligned():
    """A memory map can then be used as it is."""
    found = open_checkpoint(converted("experts4"))
    for stored in found.tensors.values():
        for part in stored.parts:
            assert part.entry.start % part.dtype.itemsize == 0  # type: ignore[attr-defined]


def test_text_only_drops_tower_and_projector_and_the_config_says_so(tmp_path: Path):
    for to, options in (("mlx", ["--recipe", "experts4"]), ("hf", [])):
        out = run(source(), tmp_path / to, "--to", to, "--text-only", *options)
        found = open_checkpoint(out)
        assert found.config.vision is None and not [n for n in found.table if "vision" in n]
        assert json.loads((out / "config.json").read_text())["vision_config"] is None
        again = open_checkpoint(run(out, tmp_path / f"{to}-again", "--to", "hf"))
        assert again.config.vision is None


class TestQuantizedTwice:
    def test_it_is_one_warning_with_names(self, tmp_path: Path, capsys):
        assert main([str(converted("w8")), "--recipe", "experts4", "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr()
        (line,) = (line for line in printed.err.splitlines() if "twice" in line)
        assert "12 tensors" in line and "experts.gate_up_proj" in line
        (row,) = (line for line in printed.out.splitlines() if line.startswith("experts"))
        assert row.rstrip().endswith("%")

    def test_what_is_carried_over_is_not(self, capsys):
        assert main([str(converted("experts4")), "--recipe", "experts4", "--dry-run"]) == 0
        assert "twice" not in capsys.readouterr().out

    def test_its_error_is_against_the_first_rounding(self, tmp_path: Path):
        run(converted("w8"), tmp_path / "out", "--recipe", "experts4")
        manifest = json.loads((tmp_path / "out" / "conversion_manifest.json").read_text())
        name = f"{LAYER}.2.experts.down_proj"
        one, other = open_checkpoint(converted("w8")).read(name), open_checkpoint(tmp_path / "out").read(name)
        error = np.linalg.norm(one - other) / np.linalg.norm(one)
        assert manifest["tensors"][name]["edge"] == "requantize"
        assert manifest["tensors"][name]["error"] == pytest.approx(error, rel=1e-3)
        assert manifest["tensors"]["model.decoder.embed_tokens.weight"]["edge"] == "same"


def test_measured_errors_are_those_of_what_was_written():
    manifest = json.loads((converted("nvfp4") / "conversion_manifest.json").read_text())
    one, other = open_checkpoint(source()), open_checkpoint(converted("nvfp4"))
    total = {role: Error() for role in manifest["errors_by_role"]}
    for name, row in one.table.items():
        a, b = one.read(name).astype(np.float64), other.read(name).astype(np.float64)
        lost, squares = float(((a - b) ** 2).sum()), float((a**2).sum())
        said = manifest["tensors"][name].get("error")
        assert (said or 0) == pytest.approx((lost / squares) ** 0.5, rel=1e-3)
        if said is not None:
            total[row.role] += Error(lost, squares)
    assert manifest["errors_by_role"] == pytest.approx({role: e.relative for role, e in total.items()}, rel=1e-3)


@pytest.mark.parametrize(
    ("source_text", "target_text", "expected"),
    [
        ("bf16", "bf16", True),
        ("bf16", "f32", True),
        ("f16", "f32", True),
        ("f32", "bf16", False),
        ("bf16", "f16", False),
        ("affine 4 g64", "affine 4 g64", True),
        ("affine 4 g64", "affine 4 g32", False),
        ("mxfp4", "nvfp4", False),
        ("nvfp4", "nvfp4 global", True),
        ("nvfp4 global", "nvfp4", False),
        ("fp8", "fp8", True),
        ("fp8", "fp8 block 128", False),
        ("bf16", "affine 8 g64", False),
    ],
)
def test_what_can_be_carried_over(source_text: str, target_text: str, expected: bool):
    one, other = parse_encoding(source_text), parse_encoding(target_text)
    assert one and other and carries(one, other) is expected


def test_a_scale_of_one_changes_nothing():
    values = np.random.default_rng(0).standard_normal((4, 8, 32)).astype(np.float32)
    plain = encode(values, parse_encoding("nvfp4"))
    found, error = convert(plain, parse_encoding("nvfp4 global"))
    assert error is None and np.array_equal(found.decode(), plain.decode())


def test_keeping_what_the_target_cannot_hold_is_said(capsys):
    assert main([str(converted("experts4")), "--to", "hf", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "hf cannot hold affine 4-bit g64: 12 tensors" in text
    assert planned(converted("experts4"), "hf").recipe is KEEP


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_seen(dtype: str, bad: float):
    values = np.full((3, 5), -6e4, np.float32).astype(DTYPES[dtype])
    assert finite(values) and finite(values[:0])
    values[1, 2] = bad
    assert not finite(values)


def test_a_large_tensor_is_measured_in_part_and_looked_at_as_a_whole():
    values = np.random.default_rng(0).standard_normal((2, 1024, 1024), np.float32)
    found, error = convert(Encoded(dense("float32"), values.shape, {"weight": values}), parse_encoding("mxfp4"))
    exact = np.linalg.norm(found.decode() - values) / np.linalg.norm(values)
    assert error and error.relative == pytest.approx(exact, rel=2e-3) and error.total < 0.3 * (values**2).sum()
    for place in range(0, values.size, values.size // 16):
        harmed = values.copy()
        harmed.reshape(-1)[place] = np.nan
        _, error = convert(Encoded(dense("float32"), values.shape, {"weight": harmed}), parse_encoding("affine 4 g64"))
        assert error and not math.isfinite(error.lost)
