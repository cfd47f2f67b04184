"""What a checkpoint is (``ModelConfig``) and how it is sampled (``GenerationConfig``). Every default lives here.

Two dialects of config.json describe the same model. Google's file names ``global_head_dim`` and
``num_global_key_value_heads``; transformers 5.23 writes ``per_layer_config`` when it saves. Both are read.
Keys that the published file leaves out take the values of transformers' ``DiffusionGemmaTextConfig``; the sizes of the
network have no default, for the class defaults there are not those of any published model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, OptionError

SLIDING, FULL = "sliding_attention", "full_attention"
MODEL_TYPES = ("diffusion_gemma", "diffusion_gemma4")  # the second is the pre-release name
UNSET = -1


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer. ``turning`` of the ``head_dim / 2`` pairs rotate, the rest stand still."""

    theta: float
    partial_rotary_factor: float = 1.0
    factor: float = 1.0

    def turning(self, head_dim: int) -> int:
        return int(self.partial_rotary_factor * head_dim // 2)


@dataclass(frozen=True)
class TextConfig:
    """The 30-layer transformer (sizes in tokens, heads or features). ``head_dims`` etc. hold one entry per layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    sliding_window: int
    layer_types: tuple[str, ...]
    head_dims: tuple[int, ...]
    num_key_value_heads: tuple[int, ...]
    ropes: tuple[Rope, ...]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0

    def full(self, layer: int) -> bool:
        return self.layer_types[layer] == FULL

    @property
    def window_keys(self) -> int:
        """Cached positions that a canvas sees in a sliding layer: W - 1, as transformers' DynamicCache keeps them."""
        return self.sliding_window - 1


@dataclass(frozen=True)
class VisionConfig:
    """The Gemma 4 vision tower, as far as its tensors go."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    position_embedding_size: int
    standardize: bool


@dataclass(frozen=True)
class ModelConfig:
    """A whole checkpoint's config.json, either dialect, checked."""

    text: TextConfig
    vision: VisionConfig | None
    canvas_length: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    image_token_id: int | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Read config.json.

        Raises:
            ConfigError: another model type, a missing size, or a combination the network cannot have.
        """
        kind = data.get("model_type")
        if kind not in MODEL_TYPES:
            raise ConfigError(f"config.json: model_type is {kind!r}; this library runs 'diffusion_gemma' only")
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("config.json has no text_config; is this a DiffusionGemma checkpoint?")
        vision = data.get("vision_config")
        config = cls(
            text=_text(text),
            vision=_vision(vision) if vision else None,
            canvas_length=data.get("canvas_length") or 256,
            dtype=str(data.get("dtype") or text.get("dtype") or data.get("torch_dtype") or "bfloat16"),
            eos_token_ids=_ids(data.get("eos_token_id", text.get("eos_token_id", 1))),
            pad_token_id=text.get("pad_token_id", 0),
            image_token_id=data.get("image_token_id", 258_880),
        )
        _check(config)
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        return cls.from_dict(read_json(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; a broken or missing file is reported by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, not an object; download it again")
    return data


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _need(data: Mapping[str, Any], key: str, kind: type, where: str = "text_config") -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"config.json: {where}.{key} is {value!r}, expected {kind.__name__}")
    return value


def _text(data: Mapping[str, Any]) -> TextConfig:
    layers = _need(data, "num_hidden_layers", int)
    types = tuple(data.get("layer_types") or (FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)))
    if len(types) != layers or set(types) - {SLIDING, FULL}:
        raise ConfigError(f"config.json: layer_types must be {layers} of {SLIDING} or {FULL}, got {types}")
    if types[-1] != FULL:
        raise ConfigError(f"config.json: the last of layer_types must be {FULL}, got {types[-1]}")
    head_dims, kv_heads = _heads(data, types)
    ropes = _ropes(data.get("rope_parameters") or {})
    return TextConfig(
        vocab_size=_need(data, "vocab_size", int),
        hidden_size=_need(data, "hidden_size", int),
        intermediate_size=_need(data, "intermediate_size", int),
        moe_intermediate_size=_need(data, "moe_intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=_need(data, "num_attention_heads", int),
        num_experts=_need(data, "num_experts", int),
        top_k_experts=_need(data, "top_k_experts", int),
        sliding_window=_need(data, "sliding_window", int),
        layer_types=types,
        head_dims=head_dims,
        num_key_value_heads=kv_heads,
        ropes=tuple(ropes[t] for t in types),
        max_position_embeddings=data.get("max_position_embeddings", 262_144),
        rms_norm_eps=data.get("rms_norm_eps", 1e-6),
        final_logit_softcapping=data.get("final_logit_softcapping", 30.0),
    )


def _heads(data: Mapping[str, Any], types: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head size and key-value heads of every layer, from either dialect."""
    head_dim, kv_heads = _need(data, "head_dim", int), _need(data, "num_key_value_heads", int)
    per_layer = data.get("per_layer_config")
    if per_layer is None:
        override = {"head_dim": data.get("global_head_dim", 512)}
        override["num_key_value_heads"] = data.get("num_global_key_value_heads") or kv_heads
        per_layer = {str(i): override for i, kind in enumerate(types) if kind == FULL}
    rows = [per_layer.get(str(i), per_layer.get(i, {})) for i in range(len(types))]
    return (
        tuple(row.get("head_dim", head_dim) for row in rows),
        tuple(row.get("num_key_value_heads", kv_heads) for row in rows),
    )


def _ropes(data: Mapping[str, Any]) -> dict[str, Rope]:
    sliding: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    full: dict[str, Any] = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    sliding |= data.get(SLIDING, {})
    full |= data.get(FULL, {})
    for name, rope, known in ((SLIDING, sliding, "default"), (FULL, full, "proportional")):
        if rope["rope_type"] != known:
            raise ConfigError(f"config.json: rope_type of {name} is {rope['rope_type']!r}, only {known!r} is supported")
    return {
        SLIDING: Rope(float(sliding["rope_theta"])),
        FULL: Rope(float(full["rope_theta"]), full["partial_rotary_factor"], float(full.get("factor", 1.0))),
    }


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    heads = _need(data, "num_attention_heads", int, "vision_config")
    sizes = {
        f.name: _need(data, f.name, int, "vision_config")
        for f in dataclasses.fields(VisionConfig)
        if f.name not in ("standardize", "num_key_value_heads", "head_dim")
    }
    return VisionConfig(
        **sizes,
        num_key_value_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or sizes["hidden_size"] // heads,
        standardize=bool(data.get("standardize", False)),
    )


def _check(config: ModelConfig) -> None:
    text = config.text
    if not 0 < text.top_k_experts <= text.num_experts:
        raise ConfigError(f"config.json: top_k_experts={text.top_k_experts} of num_experts={text.num_experts}")
    for layer, kv_heads in enumerate(text.num_key_value_heads):
        if text.num_attention_heads % kv_heads:
            raise ConfigError(
                f"config.json: layer {layer} has {text.num_attention_heads} query heads, "
                f"not a multiple of its {kv_heads} key-value heads"
            )
        if text.head_dims[layer] % 2:
            raise ConfigError(f"config.json: layer {layer} has an odd head_dim {text.head_dims[layer]}")
    if text.sliding_window < 2:
        raise ConfigError(f"config.json: sliding_window={text.sliding_window} must be at least 2")
    if config.canvas_length < 1:
        raise ConfigError(f"config.json: canvas_length={config.canvas_length} must be at least 1")


@dataclass(frozen=True)
class GenerationConfig:
    """How canvases are denoised. The defaults are the published generation_config.json, which transformers shares.

    Args:
        max_tokens: most visible tokens of an answer.
        max_denoising_steps: most steps a canvas gets (N).
        t_min, t_max: the temperature falls from ``t_max`` at the first step to ``t_min + (t_max - t_min) / N``.
        entropy_bound: nats; a token is accepted when all more certain ones together have at most this entropy.
        stability_threshold: earlier argmax canvases that must equal the current one for a row to stop;
            ``None`` turns early stopping off.
        confidence_threshold: nats; the mean entropy must be below it for a row to stop; ``None`` as above.
        temperature: scales the schedule; ``0`` takes the argmax where a token would be drawn.
        eos_token_ids, pad_token_id: an answer ends before the first of the former.

    Source: transformers 5.23, ``generation_diffusion_gemma.DiffusionGemmaGenerationConfig``.
    """

    max_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int | None = 1
    confidence_threshold: float | None = 0.005
    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_denoising_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r} must be a whole number of at least 1")
        _number("t_min", self.t_min, least=0)
        _number("t_max", self.t_max, least=0)
        _number("temperature", self.temperature, least=0)
        if self.t_max <= self.t_min:
            raise OptionError(f"t_max={self.t_max} must be greater than t_min={self.t_min}")
        _number("entropy_bound", self.entropy_bound, above=0)
        if self.confidence_threshold is not None:
            _number("confidence_threshold", self.confidence_threshold, above=0)
        stability = self.stability_threshold
        if stability is not None and (not isinstance(stability, int) or stability < 0):
            raise OptionError(f"stability_threshold={stability!r} must be a whole number of at least 0, or None")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> GenerationConfig:
        """Read generation_config.json; what it leaves out or sets to null takes the default, as in transformers."""
        sampler = data.get("sampler_config") or {}
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            raise ConfigError(f"generation_config.json: sampler {sampler['_cls_name']!r} is not supported")
        values = {
            name: data.get(name)
            for name in ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
        }
        values["max_tokens"] = data.get("max_new_tokens")
        values["entropy_bound"] = sampler.get("entropy_bound")
        given = {name: value for name, value in values.items() if value is not None}
        eos = data.get("eos_token_id")
        return cls(
            **given,
            eos_token_ids=config.eos_token_ids if eos is None else _ids(eos),
            pad_token_id=data.get("pad_token_id", config.pad_token_id),
        )

    @classmethod
    def from_folder(cls, folder: Path, config: ModelConfig) -> GenerationConfig:
        path = folder / "generation_config.json"
        return cls.from_dict(read_json(path) if path.is_file() else {}, config)

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with some options changed.

        Raises:
            OptionError: an unknown option, or a value out of range.
        """
        unknown = sorted(set(options) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise OptionError(f"unknown option {unknown[0]!r}; the options are {known}")
        return dataclasses.replace(self, **options)


def _number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e30
    if not fine or (least is not None and value < least) or (above is not None and value <= above):
        bound = f"at least {least}" if least is not None else f"greater than {above}"
        raise OptionError(f"{name}={value!r} must be a number {bound}")
