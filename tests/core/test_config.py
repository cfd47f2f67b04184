"""Both dialects of config.json, generation_config.json, and malformed ones: one line that names field and value."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import mlx_diffgemma
from mlx_diffgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig, Rope
from mlx_diffgemma.errors import ConfigError, OptionError
from mlx_diffgemma.json_file import read_json
from tests.tiny import TEXT, VISION, checkpoint, official_config

PUBLISHED = Path(mlx_diffgemma.__file__).parent / "fixtures" / "diffusiongemma-26B-A4B-it.json"
ABSENT = object()


def google(**text: Any) -> dict[str, Any]:
    """The tiny model's config.json as Google would write it; ``ABSENT`` leaves a key out."""
    rope = {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    merged = copy.deepcopy(TEXT) | {"rope_parameters": rope} | text
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 16,
        "dtype": "float32",
        "image_token_id": 5,
        "text_config": {key: value for key, value in merged.items() if value is not ABSENT},
        "vision_config": dict(VISION),
    }


def one_line(error: pytest.ExceptionInfo, *parts: str) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


def test_both_dialects_describe_the_same_model():
    """A reader of one dialect only gives the full layers the sliding layers' heads."""
    saved = read_json(checkpoint() / "config.json")
    assert "per_layer_config" in saved["text_config"] and "global_head_dim" not in saved["text_config"]
    assert ModelConfig.from_dict(google()) == ModelConfig.from_dict(saved)


def test_irregular_layers_survive_both_dialects():
    """A reader that assumes five to one, or one size for all full layers, passes the regular case only."""
    kinds = [FULL, SLIDING, SLIDING, FULL]
    shape = {"num_hidden_layers": 4, "layer_types": kinds, "num_attention_heads": 6, "num_key_value_heads": 3}
    ours = ModelConfig.from_dict(google(**shape)).text
    theirs = ModelConfig.from_dict(json.loads(official_config(**shape).to_json_string(use_diff=True))).text
    assert ours.layer_types == theirs.layer_types == tuple(kinds)
    assert ours.head_dims == theirs.head_dims == (32, 16, 16, 32)
    assert ours.num_key_value_heads == theirs.num_key_value_heads == (1, 3, 3, 1)
    assert ours.ropes == theirs.ropes


def test_a_single_layer_of_per_layer_config_may_differ():
    """Overrides belong to their layer, not to every full layer."""
    per_layer = {"2": {"num_key_value_heads": 4}, "5": {"head_dim": 64}}
    text = ModelConfig.from_dict(google(per_layer_config=per_layer)).text
    assert text.num_key_value_heads == (2, 2, 4, 2, 2, 2)
    assert text.head_dims == (16, 16, 16, 16, 16, 64)


def test_the_published_config():
    config = ModelConfig.from_dict(read_json(PUBLISHED))
    assert [i for i in range(30) if config.text.full(i)] == [5, 11, 17, 23, 29]
    assert config.text.head_dims[4:6] == (256, 512)
    assert config.text.num_key_value_heads[4:6] == (8, 2)
    assert config.text.ropes[4:6] == (Rope(1e4), Rope(1e6, 0.25))
    assert config.text.window_keys == 1023
    assert (config.canvas_length, config.eos_token_ids, config.dtype) == (256, (1, 106, 50), "bfloat16")


def test_keys_that_the_published_file_leaves_out_take_its_values():
    """transformers' class defaults (window 512, 8 heads) are not the model; only these keys have any."""
    optional = (
        "layer_types",
        "rope_parameters",
        "final_logit_softcapping",
        "rms_norm_eps",
        "use_bidirectional_attention",
    )
    assert ModelConfig.from_dict(google(**dict.fromkeys(optional, ABSENT))) == ModelConfig.from_dict(google())


def test_a_null_softcap_is_none_and_an_absent_one_is_30():
    """Reading both with ``or`` would cap a model that has no cap."""
    assert ModelConfig.from_dict(google(final_logit_softcapping=None)).text.final_logit_softcapping is None
    assert ModelConfig.from_dict(google(final_logit_softcapping=ABSENT)).text.final_logit_softcapping == 30.0


def test_a_rope_without_partial_rotary_factor_turns_every_pair():
    """transformers takes 1.0 inside a given entry; Gemma's 0.25 belongs to the absent one."""
    ropes = google()["text_config"]["rope_parameters"]
    del ropes[FULL]["partial_rotary_factor"]
    assert ModelConfig.from_dict(google(rope_parameters=ropes)).text.ropes[5].partial_rotary_factor == 1.0


def test_the_model_may_have_no_vision_tower_and_the_older_type_name():
    """Text-only conversions write null or an empty object."""
    for vision in (None, {}):
        data = google() | {"vision_config": vision, "model_type": "diffusion_gemma4"}
        assert ModelConfig.from_dict(data).vision is None


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "top_k_experts", "sliding_window"),
)


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [ABSENT, None, "64", 64.0, True, 0, -4, [64]], ids=lambda value: repr(value)[:8])
def test_a_size_must_be_a_whole_number(field: str, value: Any):
    """A size that is missing, a text, zero or negative must not reach the network."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(google(**{field: value}))
    one_line(error, f"text_config.{field}", repr(None if value is ABSENT else value))


ROPE_BAD = {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: {"rope_type": "yarn", "rope_theta": 1e6}}
TEXT_MISTAKES = {
    "layer_types too short": ({"layer_types": [FULL]}, "layer_types", "6"),
    "layer_types unknown": ({"layer_types": ["linear"] * 6}, "layer_types", "linear"),
    "layer_types a number": ({"layer_types": 6}, "layer_types", "6"),
    "layer_types of lists": ({"layer_types": [[]] * 6}, "layer_types", "[]"),
    "last layer sliding": ({"layer_types": [SLIDING] * 6}, "layer_types", SLIDING),
    "rope type": ({"rope_parameters": ROPE_BAD}, f"{FULL}.rope_type", "'yarn'"),
    "rope without a kind": ({"rope_parameters": {FULL: {}}}, f"rope_parameters.{SLIDING}", "None"),
    "rope theta a text": (
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": "1e4"}, FULL: {}}},
        f"{SLIDING}.rope_theta",
        "'1e4'",
    ),
    "rope partial in sliding layers": (
        {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}},
        f"{SLIDING}.partial_rotary_factor",
        "0.5",
    ),
    "rope a list": ({"rope_parameters": [1]}, "rope_parameters", "[1]"),
    "per_layer_config a list": ({"per_layer_config": [1]}, "per_layer_config", "[1]"),
    "per_layer_config by kind": ({"per_layer_config": {FULL: {"head_dim": 32}}}, f"per_layer_config.{FULL}", "32"),
    "per_layer_config unknown": ({"per_layer_config": {"5": {"sliding_window": 9}}}, "per_layer_config.5", "9"),
    "per_layer_config beyond": ({"per_layer_config": {"6": {"head_dim": 32}}}, "per_layer_config.6", "32"),
    "per_layer_config zero": ({"per_layer_config": {"5": {"head_dim": 0}}}, "per_layer_config.5.head_dim", "0"),
    "odd head": ({"global_head_dim": 31}, "head_dim", "31"),
    "global head a text": ({"global_head_dim": "512"}, "global_head_dim", "'512'"),
    "heads do not divide": ({"num_key_value_heads": 3}, "4 query heads", "3"),
    "more experts chosen than there are": ({"top_k_experts": 9}, "top_k_experts=9", "8"),
    "window": ({"sliding_window": 1}, "sliding_window", "1"),
    "softcap a text": ({"final_logit_softcapping": "30"}, "final_logit_softcapping", "'30'"),
    "softcap zero": ({"final_logit_softcapping": 0}, "final_logit_softcapping", "0"),
    "epsilon": ({"rms_norm_eps": -1e-6}, "rms_norm_eps", "-1e-06"),
    "context": ({"max_position_embeddings": "4096"}, "max_position_embeddings", "'4096'"),
    "pad a list": ({"pad_token_id": [0]}, "pad_token_id", "[0]"),
    "another activation": ({"hidden_activation": "silu"}, "hidden_activation", "'silu'"),
    "biases": ({"attention_bias": True}, "attention_bias", "True"),
    "bidirectional text": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention", "'all'"),
}


@pytest.mark.parametrize("mistake", TEXT_MISTAKES)
def test_a_malformed_text_config(mistake: str):
    """Each would compute something else than the checkpoint means, or die in a traceback."""
    changes, *parts = TEXT_MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(google(**changes))
    one_line(error, "config.json", *parts)


TOP_MISTAKES = {
    "another model": ({"model_type": "gemma4"}, "model_type", "'gemma4'"),
    "no model type": ({"model_type": None}, "model_type", "None"),
    "no text": ({"text_config": None}, "text_config"),
    "text a list": ({"text_config": []}, "text_config"),
    "vision a number": ({"vision_config": 3}, "vision_config", "3"),
    "vision without sizes": ({"vision_config": {"hidden_size": 32}}, "vision_config.", "None"),
    "vision size a text": ({"vision_config": VISION | {"patch_size": "16"}}, "vision_config.patch_size", "'16'"),
    "canvas zero": ({"canvas_length": 0}, "canvas_length", "0"),
    "canvas a text": ({"canvas_length": "256"}, "canvas_length", "'256'"),
    "canvas a fraction": ({"canvas_length": 25.6}, "canvas_length", "25.6"),
    "end a text": ({"eos_token_id": "<eos>"}, "eos_token_id", "'<eos>'"),
    "ends of texts": ({"eos_token_id": [1, "2"]}, "eos_token_id", "'2'"),
    "image a text": ({"image_token_id": "x"}, "image_token_id", "'x'"),
    "dtype": ({"dtype": "int4"}, "dtype", "'int4'"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("mistake", TOP_MISTAKES)
def test_a_malformed_config(mistake: str):
    changes, *parts = TOP_MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(google() | changes)
    one_line(error, "config.json", *parts)


BROKEN = {
    "nothing": b"",
    "cut": b'{"model_type": "diffusion',
    "a list": b"[1, 2]",
    "a text": b'"hello"',
    "not text": b"\xff\xfe\x00\x80",
    "nested too deeply": b"[" * 200_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_a_json_object(kind: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(BROKEN[kind])
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_folder(tmp_path)
    one_line(error, str(tmp_path / "config.json"), "download it again")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as error:
        ModelConfig.from_folder(tmp_path)
    one_line(error, str(tmp_path / "config.json"))


TINY = ModelConfig.from_dict(google())


def test_generation_nulls_and_an_absent_file_take_the_defaults(tmp_path: Path):
    """A null must not become ``None`` steps, nor switch early stopping off."""
    names = ("max_new_tokens", "max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
    nulls = dict.fromkeys((*names, "sampler_config", "eos_token_id", "pad_token_id"))
    expected = GenerationConfig(eos_token_ids=(1,), pad_token_id=0)
    assert GenerationConfig.from_dict(nulls, TINY) == expected
    assert GenerationConfig.from_dict({"sampler_config": {"entropy_bound": None}}, TINY) == expected
    assert GenerationConfig.from_folder(tmp_path, TINY) == expected
    assert expected == GenerationConfig(256, 48, 0.4, 0.8, 0.1, 1, 0.005, 1.0, (1,), 0)  # the published values


def test_generation_values_are_read(tmp_path: Path):
    data = {"max_new_tokens": 7, "max_denoising_steps": 3, "t_min": 0.1, "t_max": 0.2, "stability_threshold": 0}
    data |= {
        "confidence_threshold": 0.5,
        "sampler_config": {"entropy_bound": 0.9},
        "eos_token_id": 9,
        "pad_token_id": 3,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert GenerationConfig.from_folder(tmp_path, TINY) == GenerationConfig(7, 3, 0.1, 0.2, 0.9, 0, 0.5, 1.0, (9,), 3)


GENERATION_MISTAKES = {
    "tokens a text": ({"max_new_tokens": "256"}, "max_new_tokens", "'256'"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens", "0"),
    "steps": ({"max_denoising_steps": 4.5}, "max_denoising_steps", "4.5"),
    "temperatures crossed": ({"t_min": 0.9}, "t_min", "0.9"),
    "temperature a text": ({"t_max": "0.8"}, "t_max", "'0.8'"),
    "stability": ({"stability_threshold": True}, "stability_threshold", "True"),
    "confidence": ({"confidence_threshold": -1}, "confidence_threshold", "-1"),
    "bound": ({"sampler_config": {"entropy_bound": "x"}}, "entropy_bound", "'x'"),
    "another sampler": ({"sampler_config": {"_cls_name": "Other"}}, "sampler_config", "'Other'"),
    "sampler a list": ({"sampler_config": [1]}, "sampler_config", "[1]"),
    "ends": ({"eos_token_id": "1"}, "eos_token_id", "'1'"),
    "pad": ({"pad_token_id": "0"}, "pad_token_id", "'0'"),
}


@pytest.mark.parametrize("mistake", GENERATION_MISTAKES)
def test_a_malformed_generation_config(mistake: str):
    """The message must name the file: these values did not come from the caller."""
    changes, *parts = GENERATION_MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        GenerationConfig.from_dict(changes, TINY)
    one_line(error, "generation_config.json", *parts)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_denoising_steps": 2.0},
        {"t_max": 0.4},
        {"t_min": float("nan")},
        {"t_max": float("inf")},
        {"entropy_bound": 0},
        {"max_denoising_steps": 10_001},
        {"temperature": -1},
        {"temperature": 1e-9},
        {"temperature": "1"},
        {"stability_threshold": True},
        {"confidence_threshold": 0},
        {"eos_token_ids": 5},
        {"eos_token_ids": ("a",)},
        {"pad_token_id": "0"},
    ],
    ids=repr,
)
def test_an_option_out_of_range(options: dict[str, Any]):
    with pytest.raises(OptionError) as error:
        GenerationConfig().replace(**options)
    one_line(error, *options, str(next(iter(options.values()))))
