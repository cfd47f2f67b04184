"""GGUF files of the gguf package's making: every number as that package reads it, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mlx_diffgemma import hub
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats import gguf_blocks, gguf_file, open_checkpoint
from mlx_diffgemma.formats.gguf_names import readable_names, text_names, vision_names
from mlx_diffgemma.tensors import encoder_scalar, layer_name, tensor_table
from tests.formats import gguf_files as files

EMBEDDING, NORM = "model.decoder.embed_tokens.weight", "model.decoder.norm.weight"
EXPERTS = "model.decoder.layers.2.experts.gate_up_proj"
ENCODINGS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "Q8_0": "affine 8-bit g32",
    "Q4_0": "affine 4-bit g32",
    "Q4_1": "affine 4-bit g32",
    "Q5_0": "affine 5-bit g32",
    "Q5_1": "affine 5-bit g32",
    "MXFP4": "mxfp4",
    "Q4_K_M": "float32",
    "Q6_K": "float32",
    "IQ4_XS": "float32",
}


def refused(path: Path, *parts: str, kind: type[Exception] = CheckpointError, **options: Path) -> None:
    with pytest.raises(kind) as error:
        open_checkpoint(path, **options)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def copied(folder: Path, kind: str = "BF16") -> Path:
    """A folder of one's own with a model file and its sidecars; the file."""
    shutil.copytree(files.model(kind).parent, folder)
    return folder / files.model(kind).name


def fresh(folder: Path, kind: str = "BF16", **options) -> Path:
    dense = files.source(kind in files.MIXED)
    return files.write(files.beside(folder, dense) / "model.gguf", kind, dense, **options)


@pytest.mark.parametrize("kind", files.KINDS)
def test_every_number_is_what_gguf_reads(kind: str):
    path = files.model(kind)
    opened, expected = open_checkpoint(path), files.values(path)
    names = text_names(opened.config)
    assert {names[name] for name in opened.table} == set(expected) - {"rope_freqs.weight"}
    for name in opened.table:
        found = opened.read(name)
        assert found.dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
        assert np.array_equal(found.astype(np.float32), expected[names[name]]), name


@pytest.mark.parametrize("kind", files.KINDS)
def test_how_they_are_held(kind: str):
    """Exact formats stay packed; what MLX has no format for says so."""
    opened = open_checkpoint(files.model(kind))
    bank = opened.tensors[EXPERTS]
    assert str(bank.encoding) == ENCODINGS[kind] and bank.quantized == (kind not in files.FLAT)
    assert bank.format == {"Q4_K_M": "Q4_K", "MXFP4": "mxfp4"}.get(kind, kind if bank.quantized else ENCODINGS[kind])
    assert opened.quantized == bank.quantized and opened.format == "GGUF"
    assert opened.dtype == ("float32" if kind == "F32" else "bfloat16")
    encoded = bank.read()
    assert {n: (a.shape, a.dtype) for n, a in encoded.parts.items()} == bank.encoding.parts(bank.shape)
    assert str(opened.tensors[NORM].encoding) == "float32" and not opened.tensors[NORM].quantized


def test_bfloat16_is_the_source_rounded_once():
    """Matrices are bfloat16; norms, scales and the router are float32 in the file, and so as they were."""
    opened, dense = open_checkpoint(files.model("BF16")), files.tensors(files.source())
    for name in opened.table:
        wide = dense[name].ndim == 1 or "router" in name
        expected = dense[name] if wide else files.bfloat16(dense[name])
        assert opened.read(name).dtype == expected.dtype and opened.read(name).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("kind", files.KINDS)
@pytest.mark.parametrize("name", [EMBEDDING, EXPERTS])
def test_a_range_is_that_part_of_the_whole_and_touches_no_more(kind: str, name: str, monkeypatch: pytest.MonkeyPatch):
    stored = open_checkpoint(files.model(kind)).tensors[name]
    whole, touched, memmap = stored.read(), [], np.memmap

    def watched(path, dtype, mode, offset, shape):
        touched.append(int(np.prod(shape)))
        return memmap(path, dtype, mode, offset, shape)

    monkeypatch.setattr(np, "memmap", watched)
    for start, stop in ((0, 1), (3, 5), (stored.shape[0] - 1, stored.shape[0])):
        part = stored.read(start, stop)
        assert part.shape == (stop - start, *stored.shape[1:])
        assert all(np.array_equal(part.parts[n], whole.parts[n][start:stop]) for n in whole.parts)
        assert touched.pop() == stored.nbytes * (stop - start) // stored.shape[0] and not touched


def test_opening_reads_no_weights(monkeypatch: pytest.MonkeyPatch):
    path = files.model("Q8_0")
    monkeypatch.setattr(np, "memmap", lambda *args, **more: pytest.fail("a weight was read"))
    open_checkpoint(path)


def test_the_names_are_those_of_llama_cpp():
    config = ModelConfig.from_folder(files.source())
    table = tensor_table(config)
    assert {n: files.text_name(n) for n in table if not files.is_vision(n)} == text_names(config)
    flat = np.zeros((2, 3 * 16), np.float32)
    assert {n: files.vision_tensor(n, flat)[0] for n in table if files.is_vision(n)} == vision_names(config)
    readable = readable_names(config)
    assert {readable[name] for name in text_names(config).values()} == set(text_names(config))


def test_the_types_are_those_of_ggml():
    ours = {number: (name, block, size) for number, (name, block, size) in gguf_file.TYPES.items()}
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert ours == {number: row for number, row in theirs.items() if number in ours}
    assert {theirs[number][0] for number in set(theirs) - set(ours)} <= {"Q1_0"}


@pytest.mark.parametrize("kind", sorted(gguf_blocks.SUPER))
def test_every_type_that_gguf_is_said_to_read(kind: str, tmp_path: Path):
    rng, shape = np.random.default_rng(0), (4, 512)
    raw = files.random_blocks(shape, Type[kind], 1.0, rng)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "none")
    writer.add_tensor("a", raw, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = gguf_blocks.stored(shape, gguf_file.open_gguf(tmp_path / "a.gguf").tensors["a"])
    with np.errstate(all="ignore"):
        assert np.array_equal(stored.read(1, 3).decode(), gguf.dequantize(raw[1:3], Type[kind]), equal_nan=True)


def test_without_the_gguf_package(monkeypatch: pytest.MonkeyPatch):
    """Types that need no other reader are read; the others name the command that installs it."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_checkpoint(files.model("Q8_0")).read(EMBEDDING).shape == (512, 128)
    refused(files.model("Q4_K_M"), "Q6_K", "pip install 'mlx-diffgemma[gguf]'")


def test_opening_imports_nothing_of_gguf():
    code = f"import sys; from pathlib import Path; from mlx_diffgemma.formats import open_checkpoint; \
open_checkpoint(Path({str(files.model('Q8_0'))!r})); assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# The dialects of the two pull requests.


@pytest.mark.parametrize("arch", ["diffusion-gemma", "diffusion_gemma", "diffusion_gemma4"])
def test_the_other_dialect(arch: str, tmp_path: Path):
    def rename(arrays: files.Arrays) -> None:
        arrays["self_cond_norm.weight"] = arrays.pop("self_cond_pre_norm.weight")

    opened, plain = (
        open_checkpoint(fresh(tmp_path / "a", arch=arch, change=rename)),
        open_checkpoint(files.model("BF16")),
    )
    assert all(np.array_equal(opened.read(name), plain.read(name)) for name in plain.table)


def drop_scalars(arrays: files.Arrays) -> None:
    for name in [name for name in arrays if "enc_layer_output_scale" in name]:
        del arrays[name]


def test_without_the_encoders_scalars(tmp_path: Path):
    path = fresh(tmp_path / "a", arch="diffusion_gemma4", change=drop_scalars)
    refused(path, "encoder's 6 layer scalars", "cannot be made up", "24427", path.name)


def test_gate_and_up_apart(tmp_path: Path):
    def split(arrays: files.Arrays) -> None:
        for layer in range(6):
            both = arrays.pop(f"blk.{layer}.ffn_gate_up_exps.weight")
            gate, up = np.split(both, 2, 1)
            arrays[f"blk.{layer}.ffn_gate_exps.weight"], arrays[f"blk.{layer}.ffn_up_exps.weight"] = gate, up

    for kind in ("BF16", "Q8_0", "Q5_0"):
        opened, plain = open_checkpoint(fresh(tmp_path / kind, kind, change=split)), open_checkpoint(files.model(kind))
        assert np.array_equal(opened.read(EXPERTS), plain.read(EXPERTS))
        assert np.array_equal(opened.tensors[EXPERTS].read(2, 4).decode(), plain.read(EXPERTS)[2:4])


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_a_head_of_its_own_must_be_the_embedding(kind: str, tmp_path: Path):
    head = {"output.weight": files.tensors(files.source())[EMBEDDING]}
    same = open_checkpoint(fresh(tmp_path / "same", kind, change=lambda arrays: arrays.update(head)))
    assert set(same.table) == set(open_checkpoint(files.model(kind)).table)
    other = {"output.weight": -head["output.weight"]}
    path = fresh(tmp_path / "other", kind, change=lambda arrays: arrays.update(other))
    refused(path, "lm_head.weight", "differs from")


# Which files belong together.


def test_splits(tmp_path: Path):
    fresh(tmp_path / "a", splits=40)
    (first, *rest) = paths = sorted((tmp_path / "a").glob("*.gguf"))
    assert len(paths) == 4 and first.name == "model-00001-of-00004.gguf"
    plain = open_checkpoint(files.model("BF16"))
    for place in (first, rest[1], tmp_path / "a"):
        opened = open_checkpoint(place)
        assert opened.files == tuple(paths)
        assert all(np.array_equal(opened.read(name), plain.read(name)) for name in plain.table)
    rest[0].rename(tmp_path / "aside")
    refused(first, "lacks 1 of 4 splits", rest[0].name, kind=FileNotFoundError)
    shutil.copy(rest[1], rest[0])
    refused(first, "split 2", "its name says 1 of 4")


def test_a_folder_with_several_models(tmp_path: Path):
    path = copied(tmp_path / "a")
    assert open_checkpoint(tmp_path / "a").files == (path,)
    shutil.copy(files.model("Q8_0"), tmp_path / "a" / "other.gguf")
    refused(tmp_path / "a", "2 models", path.name, "other.gguf", "give the file")
    assert open_checkpoint(path).files == (path,)


def test_safetensors_come_first(tmp_path: Path):
    shutil.copytree(files.source(), tmp_path / "a")
    shutil.copy(files.model("Q8_0"), tmp_path / "a")
    assert open_checkpoint(tmp_path / "a").format == "Hugging Face"
    assert open_checkpoint(tmp_path / "a" / files.model("Q8_0").name).format == "GGUF"


def test_sidecars_from_elsewhere(tmp_path: Path):
    path = tmp_path / "model.gguf"
    shutil.copy(files.model("Q8_0"), path)
    refused(path, "config.json", "model.gguf", kind=FileNotFoundError)
    opened = open_checkpoint(path, sidecars=files.source())
    assert opened.folder == files.source() and opened.files == (path,)
    refused(tmp_path / "absent.gguf", "absent.gguf", kind=FileNotFoundError)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_the_image_projector_beside_the_model(kind: str, tmp_path: Path):
    path = copied(tmp_path / "a")
    projector = files.write_projector(tmp_path / "a" / "mmproj-model.gguf", files.source(), kind)
    opened, dense = open_checkpoint(path), files.tensors(files.source())
    assert opened.files == (path, projector) and set(opened.table) == set(dense) and not opened.notes
    dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[kind]
    for name in vision_names(opened.config):
        found = opened.read(name)
        assert found.shape == dense[name].shape
        assert np.array_equal(found, dense[name].astype(dtype if found.dtype != np.float32 else np.float32)), name
        assert np.array_equal(opened.tensors[name].read(1, 2).decode(), found[1:2])
    assert open_checkpoint(path, projector=projector).files == opened.files
    refused(path, "does not exist", projector=tmp_path / "no.gguf", kind=FileNotFoundError)


def test_of_several_projectors_the_published_precision(tmp_path: Path):
    path = copied(tmp_path / "a")
    for kind in ("F32", "F16", "BF16"):
        files.write_projector(tmp_path / "a" / f"mmproj-{kind}.gguf", files.source(), kind)
    assert open_checkpoint(path).files[1].name == "mmproj-BF16.gguf"


def test_a_projector_that_is_not_the_models(tmp_path: Path):
    path = copied(tmp_path / "a")
    projector = files.write_projector(tmp_path / "a" / "mmproj.gguf", files.source(), projector="gemma3")
    refused(path, "mmproj.gguf", "gemma3", "gemma4v")
    projector.unlink()
    shutil.copy(files.model("Q8_0"), projector)
    refused(path, "mmproj.gguf", "diffusion-gemma")
    files.write_projector(projector, files.source())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["vision_config"]["patch_size"] = 2
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    refused(path, "v.patch_embd.weight", "(32, 3, 4, 4)", "(32, 3, 2, 2)")
    config["vision_config"] = None
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(path).files == (path,)


# One model.

PAIRS = {
    "block_count": 7,
    "embedding_length": 64,
    "feed_forward_length": 193,
    "expert_count": 9,
    "expert_used_count": 3,
    "expert_feed_forward_length": 65,
    "attention.head_count": 8,
    "attention.head_count_kv": [2, 2, 2, 2, 2, 2],
    "attention.key_length": 16,
    "attention.key_length_swa": 32,
    "attention.sliding_window": 1024,
    "attention.sliding_window_pattern": [True] * 6,
    "attention.shared_kv_layers": 1,
    "embedding_length_per_layer_input": 256,
    "final_logit_softcapping": 15.0,
    "rope.freq_base": 1e4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "diffusion.canvas_length": 256,
}


def with_pair(key: str, value):
    kinds = {list: "add_array", float: "add_float32", int: "add_uint32", str: "add_string", bool: "add_bool"}
    return lambda writer: getattr(writer, kinds[type(value)])(key, value)


@pytest.mark.parametrize("key", PAIRS)
def test_a_network_that_config_json_does_not_describe(key: str, tmp_path: Path):
    name = key if key.startswith("diffusion.") else f"{files.ARCH}.{key}"
    path = fresh(tmp_path / "a", pairs=with_pair(name, PAIRS[key]))
    said = f"{PAIRS[key]:g}" if isinstance(PAIRS[key], float) else PAIRS[key]
    refused(path, f"{path}: {name} is {said}, config.json calls for", "one model?")


@pytest.mark.parametrize(
    "pair",
    [("attention.head_count", [4] * 6), ("feed_forward_length", [192] * 6), ("attention.sliding_window_pattern", 6)],
)
def test_the_same_said_otherwise(pair: tuple, tmp_path: Path):
    open_checkpoint(fresh(tmp_path / "a", pairs=with_pair(f"{files.ARCH}.{pair[0]}", pair[1])))


def test_a_pair_of_another_type_is_no_match(tmp_path: Path):
    refused(fresh(tmp_path / "a", pairs=with_pair(f"{files.ARCH}.block_count", "six")), "block_count is 'six'")


def test_another_architecture(tmp_path: Path):
    refused(fresh(tmp_path / "a", arch="gemma4"), "'gemma4'", "diffusion-gemma")
    projector = files.write_projector(tmp_path / "a" / "mmproj.gguf", files.source())
    refused(projector, "mmproj.gguf is an image projector")


MISTAKES = {
    "missing": (lambda a: a.pop("blk.3.ffn_gate_up_exps.weight"), ("lacks 1 tensor:", f"{layer_name(3)}.experts")),
    "several missing": (lambda a: [a.pop(n) for n in list(a)[:5]], ("lacks 5 tensors:", "and 2 more")),
    "scalar missing": (lambda a: a.pop("blk.0.layer_output_scale.weight"), (f"{layer_name(0)}.layer_scalar",)),
    "one encoder scalar missing": (lambda a: a.pop("blk.4.enc_layer_output_scale.weight"), (encoder_scalar(4),)),
    "extra": (lambda a: a.update({"blk.0.extra.weight": np.zeros(32, np.float32)}), ("blk.0.extra.weight",)),
    "values in a full layer": (
        lambda a: a.update({"blk.5.attn_v.weight": np.zeros((64, 128), np.float32)}),
        ("blk.5.attn_v.weight", "beyond what"),
    ),
    "beyond the layers": (
        lambda a: a.update({"blk.6.attn_norm.weight": a["output_norm.weight"]}),
        ("blk.6.attn_norm",),
    ),
    "misshapen": (lambda a: a.update({"output_norm.weight": np.zeros(96, np.float32)}), ("(96,)", "(128,)")),
    "misshapen blocks": (lambda a: a.update({"token_embd.weight": np.zeros((64, 128), np.float32)}), ("(64, 128)",)),
    "both names of a norm": (
        lambda a: a.update({"self_cond_norm.weight": a["self_cond_pre_norm.weight"]}),
        ("self_conditioning.pre_norm.weight is stored twice",),
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_tensors_that_are_not_the_models(kind: str, tmp_path: Path):
    change, parts = MISTAKES[kind]
    refused(fresh(tmp_path / "a", "Q8_0", change=change), "model.gguf" if "twice" not in parts[0] else "", *parts)


@pytest.mark.parametrize(("name", "kind"), [("output_norm.weight", "Q8_0"), ("token_embd.weight", "F64")])
def test_types_that_are_not_for_this_tensor(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = files.type_of
    monkeypatch.setattr(files, "type_of", lambda k, n, shape: Type[kind] if n == name else given(k, n, shape))
    if kind == "F64":
        coded = files.coded
        monkeypatch.setattr(files, "coded", lambda a, k, r: a.astype(np.float64) if k == Type.F64 else coded(a, k, r))
    refused(fresh(tmp_path / "a"), name, kind, "does not read")


# As the rest of the library sees it.


@pytest.mark.parametrize(("kind", "least", "most"), [("Q8_0", 1.1, 1.4), ("BF16", 0.99, 1.0), ("Q6_K", 4.5, 5.0)])
def test_the_hub_gives_the_file_and_its_size(kind: str, least: float, most: float):
    """What is packed stays so in memory; what gguf dequantizes becomes the config's dtype, here float32."""
    path, sizes = files.model(kind), []
    assert ModelConfig.from_folder(path.parent).dtype == "float32"
    assert hub.resolve(str(path), lambda config, size: sizes.append(size)) == path
    assert hub.resolve(str(path.parent), lambda config, size: sizes.append(size)) == path.parent
    assert sizes[0] == sizes[1] and least < sizes[0] / path.stat().st_size < most
