"""What lies beside the weights: sidecars byte for byte, config.json in the right dialect, the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from convert.command import main
from convert.dialect import googles
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import ConfigError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.json_file import read_json
from tests.convert.cases import contents, converted, refused, run, source
from tests.core.test_config import PUBLISHED

SIDECARS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")


def test_sidecars_are_copied_byte_for_byte():
    there, here = contents(source()), contents(converted("experts4"))
    assert all(here[name] == there[name] for name in (*SIDECARS, "generation_config.json"))
    assert "README.md" not in here


def test_sidecars_from_elsewhere_come_first(tmp_path: Path):
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "chat_template.jinja").write_text("newer")
    out = run(source(), tmp_path / "out", "--sidecars-from", str(tmp_path / "aside"))
    assert (out / "chat_template.jinja").read_text() == "newer"
    assert (out / "tokenizer.json").read_bytes() == (source() / "tokenizer.json").read_bytes()


def test_absent_sidecars_are_named(tmp_path: Path, capsys):
    shutil.copytree(source(), tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").unlink()
    assert main([str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note"))
    assert "chat_template.jinja" in line and "tokenizer" not in line


def test_sidecars_from_nowhere(tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        assert name in refused(capsys, source(), "--out", tmp_path / "out", "--sidecars-from", tmp_path / name)


class TestConfig:
    def test_the_published_file_keeps_every_key(self):
        data = read_json(PUBLISHED)
        assert googles(data, "bfloat16") == data

    def test_transformers_dialect_becomes_googles(self):
        data = read_json(source() / "config.json")
        assert "per_layer_config" in data["text_config"]
        found = googles(data, "bfloat16")
        text = found["text_config"]
        assert "per_layer_config" not in text
        assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (32, 1)
        assert text["final_logit_softcapping"] == 30.0
        assert ModelConfig.from_dict(found).text == ModelConfig.from_dict(data).text
        kept = set(data["text_config"]) - {"per_layer_config"}
        assert {key: text[key] for key in kept if key != "dtype"} == {
            key: data["text_config"][key] for key in kept if key != "dtype"
        }

    def test_layers_that_differ_cannot_be_said(self):
        data = read_json(source() / "config.json")
        data["text_config"]["per_layer_config"]["2"] = {"head_dim": 32}
        with pytest.raises(ConfigError, match="layer 2"):
            googles(data, "bfloat16")

    def test_quantization_is_dropped_and_the_dtype_follows(self, tmp_path: Path):
        found = read_json(run(converted("experts4"), tmp_path / "out", "--to", "hf") / "config.json")
        assert not [key for key in found if "quantization" in key]
        assert found["dtype"] == "bfloat16" and read_json(source() / "config.json")["dtype"] == "float32"

    def test_there_and_back_is_the_same_file(self, tmp_path: Path):
        first = run(source(), tmp_path / "hf", "--to", "hf")
        back = run(run(first, tmp_path / "mlx", "--recipe", "bf16"), tmp_path / "back", "--to", "hf")
        assert contents(first)["config.json"] == contents(back)["config.json"]

    def test_mlx_lists_exceptions_with_their_mode_under_both_names(self):
        found = read_json(converted("mxfp4") / "config.json")
        block = found["quantization"]
        assert block == found["quantization_config"]
        assert {key: block[key] for key in ("group_size", "bits", "mode")} == {
            "group_size": 32,
            "bits": 4,
            "mode": "mxfp4",
        }
        eight = {"group_size": 64, "bits": 8, "mode": "affine"}
        assert block["model.decoder.embed_tokens"] == eight
        assert block["model.decoder.layers.0.self_attn.q_proj"] == eight
        assert not [key for key in block if "experts" in key or "vision" in key or "norm" in key]


class TestManifest:
    def test_it_has_the_hash_of_every_file(self):
        folder = converted("experts4")
        found = read_json(folder / "conversion_manifest.json")
        for place, files in ((folder, found["outputs"]), (source(), found["source"]["files"])):
            for name, facts in files.items():
                data = (place / name).read_bytes()
                assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name
        assert set(found["outputs"]) == {path.name for path in folder.iterdir()} - {"conversion_manifest.json"}
        assert list(found["source"]["files"]) == ["model.safetensors"]

    def test_it_says_what_was_done(self):
        found = read_json(converted("experts4") / "conversion_manifest.json")
        assert found["recipe"]["roles"]["experts"] == "affine 4-bit g64" and found["target"] == "mlx"
        assert set(found["tensors"]) == set(open_checkpoint(source()).table)
        assert 0.05 < found["errors_by_role"]["experts"] < 0.15 > found["errors_by_role"]["attention"]

    def test_the_same_conversion_gives_the_same_bytes(self, tmp_path: Path):
        again = run(source(), tmp_path / "again", "--recipe", "experts4")
        assert contents(again) == contents(converted("experts4"))


class TestVerify:
    def test_all_is_well(self, capsys):
        assert main([str(converted("experts4")), "--show", "--verify"]) == 0
        assert "verified, 8 files" in capsys.readouterr().out
        assert main([str(converted("experts4")), "--show"]) == 0
        assert "not verified" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "harm"),
        [
            ("model.safetensors", "changed"),
            ("tokenizer.json", "changed"),
            ("chat_template.jinja", "longer"),
            ("processor_config.json", "gone"),
        ],
    )
    def test_a_harmed_file_is_named(self, name: str, harm: str, tmp_path: Path, capsys):
        shutil.copytree(converted("experts4"), tmp_path / "copy")
        path = tmp_path / "copy" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data if harm == "changed" else data + b" ")
        if harm == "gone":
            path.unlink()
        line = refused(capsys, tmp_path / "copy", "--show", "--verify")
        assert name in line and {"changed": "contents", "longer": "bytes", "gone": "missing"}[harm] in line

    def test_without_a_manifest(self, capsys):
        assert "conversion_manifest.json" in refused(capsys, source(), "--show", "--verify")

    def test_a_hostile_manifest_names_no_file_elsewhere(self, tmp_path: Path, capsys):
        shutil.copytree(converted("experts4"), tmp_path / "copy")
        path = tmp_path / "copy" / "conversion_manifest.json"
        path.write_text(json.dumps(read_json(path) | {"outputs": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}))
        assert "no file of this folder" in refused(capsys, tmp_path / "copy", "--show", "--verify")
