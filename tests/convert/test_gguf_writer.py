"""GGUF files of our making, as the gguf package and our own reader see them; and back to where they came from."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file

from convert import chunks, plan
from convert.command import main
from convert.gguf_target import GGUF
from convert.output import OutputError
from convert.progress import Silent
from mlx_diffgemma.api import generate, load
from mlx_diffgemma.errors import CheckpointError, OptionError
from mlx_diffgemma.formats import Checkpoint, open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding, dense, grouped
from mlx_diffgemma.formats.gguf_names import text_names, vision_names
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.tensors import VISION
from tests.convert.cases import run, same_numbers
from tests.convert.gguf_written import (
    furnished,
    home,
    model_file,
    planned,
    projector_file,
    recipe,
    source,
    write,
    written,
)
from tests.formats import gguf_files as files
from tests.formats.quantized import quantized

NORM, EMBEDDING = "model.decoder.norm.weight", "model.decoder.embed_tokens.weight"
EXPERTS = "model.decoder.layers.3.experts.down_proj"


# There and back again.


def test_bfloat16_there_and_back_is_the_same_file(tmp_path: Path):
    back = run(written("keep"), tmp_path / "hf", "--to", "hf", "--recipe", "bf16")
    one, other = (load_file(folder / "model.safetensors") for folder in (source(), back))
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in one.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in other.items()
    }
    assert any("vision" in name for name in one)
    assert set(json.loads((back / "conversion_manifest.json").read_text())["errors_by_role"].values()) <= {0.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_numbers_stay_what_they_are(dtype: str):
    opened = open_checkpoint(written("keep", dtype))
    same_numbers(source(dtype), written("keep", dtype), encodings=False)
    assert str(opened.tensors[EXPERTS].encoding) == dtype and str(opened.tensors[NORM].encoding) == "float32"


@pytest.mark.parametrize("kind", ["all mxfp4", "mxfp4"])
def test_mxfp4_of_mlx_there_and_back_is_bit_exact(kind: str, tmp_path: Path):
    start = shutil.copytree(quantized(kind), tmp_path / "start")
    there = write(furnished(start), tmp_path / "gguf")
    back = open_checkpoint(run(there, tmp_path / "mlx", "--to", "mlx"))
    first, middle, compared = open_checkpoint(start), open_checkpoint(there), 0
    for name, stored in first.tensors.items():
        if stored.encoding.mode == "mxfp4":
            compared += 1
            for other in (middle, back):
                a, b = stored.read(), other.encoded(name)
                assert b.encoding.mode == "mxfp4" and a.parts.keys() == b.parts.keys()
                assert all(a.parts[part].tobytes() == b.parts[part].tobytes() for part in a.parts), name
    assert compared >= (12 if kind == "mxfp4" else 40)


def test_q8_0_to_q8_0_is_bit_exact(tmp_path: Path):
    again = write(written("q8_0"), tmp_path / "again")
    for one, other in zip(gguf.GGUFReader(model_file(written("q8_0"))).tensors,
                          gguf.GGUFReader(model_file(again)).tensors, strict=True):  # fmt: skip
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(one.data.view(np.uint8), other.data.view(np.uint8)), one.name


def test_q8_0_of_the_gguf_package_and_of_mlx(tmp_path: Path):
    """A foreign Q8_0 file becomes MLX's affine format and Q8_0 again, and no code changes."""
    folder = furnished(shutil.copytree(files.model("Q8_0").parent, tmp_path / "a"))
    mlx = run(folder, tmp_path / "mlx", "--to", "mlx")
    assert str(open_checkpoint(mlx).tensors[EXPERTS].encoding) == "affine 8-bit g32"
    again = write(mlx, tmp_path / "again")
    one, other = files.values(files.model("Q8_0")), files.values(model_file(again))
    rows = {n: t.tensor_type for n, t in ((t.name, t) for t in gguf.GGUFReader(model_file(again)).tensors)}
    assert rows["token_embd.weight"] == rows["blk.0.ffn_gate_up_exps.weight"] == Type.Q8_0
    assert all(np.array_equal(one[name], other[name]) for name in one if name != "rope_freqs.weight")


def lines(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict[str, str]:
    """The command's table by role, and its other lines by their first word."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    return {line.split()[0]: line for line in (printed.out + printed.err).splitlines() if line.strip()}


class TestWhatIsSaidIsSo:
    """The plan, the table at the end and the manifest name what is in the file."""

    def test_codes_with_a_bias_are_quantized_twice(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        """MLX's affine codes are not Q8_0's, though bits and groups are the same."""
        mlx = furnished(run(source(), tmp_path / "mlx", "--recipe", "q8_0"))
        assert {item.edge for item in planned(mlx).items if item.format == "Q8_0"} == {"requantize"}
        found = lines(capsys, mlx, "--to", "gguf", "--out", tmp_path / "out")
        assert "quantized twice" in found["warning:"]
        assert found["experts"].split()[-1].endswith("%")
        row = json.loads((tmp_path / "out" / "conversion_manifest.json").read_text())["tensors"][EXPERTS]
        assert row["to"] == "Q8_0" and row["edge"] == "requantize" and 0 < row["error"] < 0.01

    @pytest.mark.parametrize("name", ["keep", "q8_0"])
    def test_q8_0_is_carried(self, name: str, capsys: pytest.CaptureFixture):
        assert {item.edge for item in planned(written("q8_0"), name).items} == {"same"}
        assert "warning:" not in lines(capsys, written("q8_0"), "--to", "gguf", "--dry-run")

    def test_q8_0_by_way_of_mlx_turns_out_to_be_exact(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        mlx = furnished(run(written("q8_0"), tmp_path / "mlx", "--to", "mlx"))
        assert lines(capsys, mlx, "--to", "gguf", "--out", tmp_path / "out")["experts"].split()[-1] == "exact"

    def test_every_row_has_the_type_that_the_table_names(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        found = lines(capsys, source(), "--to", "gguf", "--recipe", "q8_0", "--out", tmp_path / "out")
        assert "bfloat16  Q8_0 " in found["experts"] and found["experts"].split()[-1].endswith("%")
        assert "bfloat16  float32 " in found["norm"] and "bfloat16  bfloat16 " in found["projector"]
        opened = open_checkpoint(tmp_path / "out")
        for item in planned(source(), "q8_0").items:
            assert item.format == opened.tensors[item.row.name].format, item.row.name

    @pytest.mark.parametrize(
        ("name", "dtype", "expected"),
        [("keep", "bfloat16", "bfloat16"), ("keep", "float32", "float32"), ("q8_0", "float32", "bfloat16")],
    )
    def test_the_config_says_what_to_compute_in(self, name: str, dtype: str, expected: str):
        """Norms are float32 in every GGUF file: that says nothing of the model."""
        assert open_checkpoint(written(name, dtype)).config.dtype == expected

    def test_both_files_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert main([str(source()), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 0
        text = capsys.readouterr().out
        assert f"file   {tmp_path / 'a.gguf'}" in text and f"file   {tmp_path / 'mmproj-a.gguf'}" in text

    def test_a_file_is_shown_where_it_is(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        """Not where its config is, whose manifest is of other files; and what every GGUF file does is not odd."""
        write(source(), tmp_path / "model.gguf", "q8_0")
        found = lines(capsys, tmp_path / "model.gguf", "--sidecars-from", written("keep"), "--show")
        assert found["folder"].endswith(str(tmp_path)) and found["sidecars"].endswith(str(written("keep")))
        assert "not by this library" in found["made"] and "index" not in found["note"]
        assert main([str(tmp_path / "model.gguf"), "--sidecars-from", str(written("keep")), "--show", "--verify"]) == 2
        assert "nothing to verify" in capsys.readouterr().err
        assert "processor_config.json" in lines(capsys, written("keep"), "--show")["note"], "and no other"


# What others make of it.


@pytest.mark.parametrize("name", ["keep", "q8_0", "mxfp4", "w8"])
def test_the_gguf_package_reads_the_same_numbers(name: str):
    folder = written(name)
    opened, expected = open_checkpoint(folder), files.values(model_file(folder), projector_file(folder))
    names = text_names(opened.config) | vision_names(opened.config)
    assert set(names.values()) | {"rope_freqs.weight"} == set(expected)
    for canonical, array in ((n, opened.read(n).astype(np.float32)) for n in opened.table):
        theirs = expected[names[canonical]]
        if theirs.ndim == 4:
            theirs = theirs.transpose(0, 2, 3, 1).reshape(array.shape)
        assert np.array_equal(array, theirs), canonical


def test_bfloat16_is_what_llama_cpps_way_of_writing_gives():
    """Against the file that the gguf package alone makes: the same names, types and bytes; the same pairs."""
    ours, theirs = gguf.GGUFReader(model_file(written("keep"))), gguf.GGUFReader(files.model("BF16"))
    one, other = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
    assert set(one) == set(other)
    for name in set(one) - {"rope_freqs.weight"}:
        assert one[name].tensor_type == other[name].tensor_type, name
        assert one[name].shape.tolist() == other[name].shape.tolist(), name
        if one[name].tensor_type == Type.BF16:
            assert np.array_equal(one[name].data, other[name].data), name
    for key, field in theirs.fields.items():
        if not key.startswith(("tokenizer.", "GGUF.")):
            assert ours.fields[key].types == field.types, key
            assert ours.fields[key].contents() == field.contents(), key


def test_the_projector_is_what_llama_cpps_way_of_writing_gives(tmp_path: Path):
    path = files.write_projector(tmp_path / "mmproj.gguf", source_as_float32(), "BF16")
    one, other = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (projector_file(written("keep")), path))
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.shape.tolist() == other[name].shape.tolist(), name
        ours, theirs = (gguf.dequantize(t.data, t.tensor_type) for t in (tensor, other[name]))
        assert np.array_equal(ours.reshape(-1), theirs.reshape(-1)), name
    assert one["v.patch_embd.weight"].tensor_type == one["v.position_embd.weight"].tensor_type == Type.F32
    assert one["mm.input_projection.weight"].tensor_type == Type.BF16
    pairs = gguf.GGUFReader(projector_file(written("keep"))).fields
    assert pairs["clip.vision.projector_type"].contents() == gguf.VisionProjectorType.GEMMA4V
    assert pairs["general.type"].contents() == gguf.GGUFType.MMPROJ


def source_as_float32() -> Path:
    folder = Path(home().name) / "wide"
    if not folder.is_dir():
        files.beside(folder, files.source())
        arrays = load_file(source() / "model.safetensors")
        save_file({name: array.astype(np.float32) for name, array in arrays.items()}, folder / "model.safetensors")
    return folder


def test_the_rotary_frequencies():
    """A quarter of the pairs of a full layer turn: 4 of 16."""
    assert (
        files.values(model_file(written("keep")))["rope_freqs.weight"].tolist() == [1.0] * 4 + [np.float32(1e30)] * 12
    )


def test_the_sampler_settings():
    pairs = gguf.GGUFReader(model_file(written("keep"))).fields
    settings = open_checkpoint(source()).generation
    assert pairs["diffusion.eb_max_steps"].contents() == settings.max_denoising_steps
    for key in ("t_min", "t_max", "entropy_bound", "confidence_threshold"):
        assert pairs[f"diffusion.eb_{key}"].contents() == pytest.approx(getattr(settings, key))
    assert pairs["diffusion.eb_stability_threshold"].contents() == 1


def test_q8_0_within_its_bound():
    """Half a step, and the rounding of the step to float16; as gguf quantizes."""
    first, opened = open_checkpoint(source()), open_checkpoint(written("q8_0"))
    blocks = [n for n, stored in opened.tensors.items() if stored.format == "Q8_0"]
    assert len(blocks) == sum(len(r.shape) > 1 and r.role not in ("router", *VISION) for r in first.table.values())
    for name in blocks:
        values, found = first.read(name).astype(np.float32), opened.read(name)
        largest = np.abs(values).reshape(-1, 32).max(-1)
        error = np.abs(values - found).reshape(-1, 32).max(-1)
        assert (error <= largest / 127 * (0.5 + 127 * 2**-11) + 1e-12).all(), name
        assert np.array_equal(found, gguf.dequantize(gguf.quantize(values, Type.Q8_0), Type.Q8_0)), name
    figures = json.loads((written("q8_0") / "conversion_manifest.json").read_text())
    assert 0 < figures["errors_by_role"]["experts"] < 0.01


# The folder and the file.


def test_the_folder_holds_all_that_loading_needs():
    folder = written("q8_0")
    assert {path.name for path in folder.iterdir()} == {
        "source-bfloat16-Q8_0.gguf",
        "mmproj-source-bfloat16-BF16.gguf",
        "config.json",
        "conversion_manifest.json",
        *(path.name for path in source().iterdir() if path.suffix != ".safetensors"),
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (source() / name).read_bytes()
    outputs = json.loads((folder / "conversion_manifest.json").read_text())["outputs"]
    assert all(outputs[path.name]["bytes"] == path.stat().st_size for path in folder.glob("*.gguf"))


def test_a_file_alone(tmp_path: Path):
    write(source(), tmp_path / "model.gguf", "q8_0")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "mmproj-model.gguf"}
    opened = open_checkpoint(tmp_path / "model.gguf", sidecars=source())
    assert opened.config.vision and opened.quantized
    write(source(), tmp_path / "text.gguf", text_only=True)
    assert not (tmp_path / "mmproj-text.gguf").exists()
    (tmp_path / "mmproj-model.gguf").unlink()
    assert open_checkpoint(tmp_path / "text.gguf", sidecars=source()).config.vision is None
    with pytest.raises(OptionError, match="is there already"):
        write(source(), tmp_path / "text.gguf", text_only=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = run(source(), tmp_path / "out", "--to", "gguf", "--recipe", "w8")
    assert open_checkpoint(out).tensors[EXPERTS].format == "Q8_0"
    assert main([str(model_file(out)), "--show"]) == 0 and "GGUF" in capsys.readouterr().out
    assert main([str(source()), "--to", "gguf", "--recipe", "experts4", "--out", str(tmp_path / "b")]) == 2
    assert "which 'gguf' cannot hold" in capsys.readouterr().err


def test_the_same_bytes_every_time(tmp_path: Path):
    again = write(source(), tmp_path / "again", "q8_0")
    assert model_file(again).read_bytes() == model_file(written("q8_0")).read_bytes()


def test_the_planned_size_is_the_files(tmp_path: Path):
    checkpoint = open_checkpoint(source())
    planned = plan.make(checkpoint, GGUF(), recipe("q8_0"))
    tensors = [t for path in written("q8_0").glob("*.gguf") for t in gguf.GGUFReader(path).tensors]
    assert planned.nbytes == sum(int(t.n_bytes) for t in tensors if t.name != "rope_freqs.weight")


def test_the_demo_in_gguf_answers_as_before(tmp_path: Path):
    """From the user's side: a .gguf file by its name, with its tokenizer beside it."""
    path = model_file(write(DEMO, tmp_path / "demo"))
    for seed in range(2):
        answers = [generate(*load(str(place), backend="mlx"), "hello", seed=seed) for place in (DEMO, path)]
        assert answers[0].text == answers[1].text and answers[0].tokens == answers[1].tokens


def test_what_gguf_holds():
    target, table = GGUF(), open_checkpoint(source()).table
    q8_0, mxfp4 = grouped("affine", bits=8, group_size=32), grouped("mxfp4")
    tower = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"
    for encoding in (q8_0, mxfp4):
        assert target.holds(table[EMBEDDING], encoding) and target.holds(table[EXPERTS], encoding)
        assert not target.holds(table[NORM], encoding) and not target.holds(table[tower], encoding)
    for mode, bits, size in (("affine", 4, 32), ("affine", 8, 64), ("nvfp4", 0, 0), ("mxfp8", 0, 0)):
        assert not target.holds(table[EMBEDDING], grouped(mode, bits=bits, group_size=size))
    assert not target.holds(table[EMBEDDING], Encoding("fp8"))
    assert all(target.holds(row, dense("float32")) for row in table.values())
    assert target.holds(table[EMBEDDING], dense()) and not target.holds(table[NORM], dense())


def test_only_the_chunks_in_flight_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK", 1 << 13)
    checkpoint = open_checkpoint(source("float32"))
    planned = plan.make(checkpoint, GGUF(), recipe("q8_0"))
    tracemalloc.start()
    GGUF().write(planned, tmp_path / "a.gguf", Silent())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < checkpoint.nbytes / 4, f"{peak:,} of {checkpoint.nbytes:,}"


# What goes wrong leaves nothing.


def refused(kind: type[Exception], folder: Path | Checkpoint, out: Path, *parts: str) -> None:
    before = set(out.parent.iterdir())
    with pytest.raises(kind) as error:
        write(folder, out, "q8_0")
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    left = {path for path in out.rglob("*")} if out.is_dir() else set(out.parent.iterdir()) - before
    assert not left, left


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_numbers_that_are_none(name: str, tmp_path: Path):
    folder = shutil.copytree(source(), tmp_path / "source")
    arrays = {n: a.copy() for n, a in load_file(folder / "model.safetensors").items()}
    arrays[EXPERTS][3, 5, 7] = np.nan
    save_file(arrays, folder / "model.safetensors")
    refused(CheckpointError, folder, tmp_path / name, EXPERTS, "NaN")


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_a_full_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks.os, "pwrite", full)
    refused(OutputError, source(), tmp_path / name, "No space left on device")


def test_an_interrupt_leaves_nothing(tmp_path: Path):
    class Impatient:
        def advance(self, read: int) -> None:
            raise KeyboardInterrupt

    checkpoint = open_checkpoint(source())
    with pytest.raises(KeyboardInterrupt):
        GGUF().write(plan.make(checkpoint, GGUF(), recipe("keep")), tmp_path / "a.gguf", Impatient())
    assert not list(tmp_path.iterdir())


def test_the_source_itself_and_a_folder_in_use(tmp_path: Path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").write_text("")
    for out in (source(), tmp_path / "used"):
        with pytest.raises(OptionError, match="--out"):
            write(source(), out)
    assert (tmp_path / "used" / "thing").exists()


def test_no_tokenizer_at_all(tmp_path: Path):
    folder = shutil.copytree(source(), tmp_path / "source")
    (folder / "tokenizer.json").unlink()
    refused(FileNotFoundError, folder, tmp_path / "out.gguf", "tokenizer.json")
