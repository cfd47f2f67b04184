"""What a checkpoint is (``ModelConfig``) and how it is sampled (``GenerationConfig``). Every default lives here.

Two dialects of config.json describe the same model. Google's file names ``global_head_dim`` and
``num_global_key_value_heads``; transformers 5.23 writes ``per_layer_config`` when it saves. Both are read.
Keys that the published file leaves out take the values of transformers' ``DiffusionGemmaTextConfig``; the sizes of the
network have no default, for the class defaults there are not those of any published model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, OptionError
from .json_file import read_json

SAMPLER = "EntropyBoundSamplerConfig"
SLIDING, FULL = "sliding_attention", "full_attention"
MODEL_TYPES = ("diffusion_gemma", "diffusion_gemma4")  # the second is the pre-release name
UNSET = -1
LARGEST = 2**24  # of any size; a file that claims more is damaged, and would cost time before that shows
MOST = {"num_hidden_layers": 10_000, "max_position_embeddings": 2**31}
MOST_STEPS, COLDEST = 10_000, 1e-6  # noise is made for all steps at once; logits over less than this leave float32


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
            raise ConfigError(f"config.json: model_type is {kind!r:.80}; this library runs 'diffusion_gemma' only")
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("config.json has no text_config; is this a DiffusionGemma checkpoint?")
        vision = data.get("vision_config")
        config = cls(
            text=_text(text),
            vision=_vision(_object("vision_config", vision)) if vision else None,
            canvas_length=_size(data, "canvas_length", "", 256),
            dtype=_dtype(data.get("dtype") or text.get("dtype") or data.get("torch_dtype") or "bfloat16"),
            eos_token_ids=_ids("eos_token_id", data.get("eos_token_id", text.get("eos_token_id", 1))),
            pad_token_id=_id("text_config.pad_token_id", text.get("pad_token_id", 0)),
            image_token_id=_id("image_token_id", data.get("image_token_id", 258_880)),
        )
        _check(config, data, text)
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        return cls.from_dict(read_json(folder / "config.json"))


def _id(name: str, value: Any, file: str = "config.json") -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ConfigError(f"{file}: {name} is {value!r:.80}, expected a token id or null")
    return value


def _ids(name: str, value: Any, file: str = "config.json") -> tuple[int, ...]:
    values = () if value is None else value if isinstance(value, list | tuple) else (value,)
    if not all(type(item) is int and item >= 0 for item in values):
        raise ConfigError(f"{file}: {name} is {value!r:.80}, expected a token id or a list of them")
    return tuple(values)


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"config.json: dtype is {value!r:.80}, expected bfloat16, float16 or float32")
    return name


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r:.80}, expected an object")
    return value


def _size(data: Mapping[str, Any], key: str, where: str = "text_config.", default: int | None = None) -> int:
    """A whole number of at least 1; without a default it must be there."""
    value, most = default if data.get(key) is None else data[key], MOST.get(key, LARGEST)
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {where}{key} is {value!r:.80}, expected a whole number of at least 1")
    if value > most:
        raise ConfigError(f"config.json: {where}{key} is more than {most:,}, the largest that this library reads")
    return value


def _positive(data: Mapping[str, Any], key: str, default: float | None, where: str = "text_config.") -> float:
    value = data.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"config.json: {where}{key} is {value!r:.80}, expected a number greater than 0")
    return value


def _text(data: Mapping[str, Any]) -> TextConfig:
    layers = _size(data, "num_hidden_layers")
    types = _layer_types(data, layers)
    head_dims, kv_heads = _heads(data, types)
    ropes = _ropes(data)
    no_cap = data.get("final_logit_softcapping", 30.0) is None
    return TextConfig(
        vocab_size=_size(data, "vocab_size"),
        hidden_size=_size(data, "hidden_size"),
        intermediate_size=_size(data, "intermediate_size"),
        moe_intermediate_size=_size(data, "moe_intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=_size(data, "num_attention_heads"),
        num_experts=_size(data, "num_experts"),
        top_k_experts=_size(data, "top_k_experts"),
        sliding_window=_size(data, "sliding_window"),
        layer_types=types,
        head_dims=head_dims,
        num_key_value_heads=kv_heads,
        ropes=tuple(ropes[t] for t in types),
        max_position_embeddings=_size(data, "max_position_embeddings", default=262_144),
        rms_norm_eps=_positive(data, "rms_norm_eps", 1e-6),
        final_logit_softcapping=None if no_cap else _positive(data, "final_logit_softcapping", 30.0),
    )


def _layer_types(data: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    given = data.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    known = isinstance(given, list) and all(kind in (SLIDING, FULL) for kind in given)
    if not known or len(given) != layers:
        raise ConfigError(f"config.json: layer_types must be {layers} of {SLIDING} or {FULL}, got {given!r:.200}")
    if given[-1] != FULL:
        raise ConfigError(f"config.json: the last of layer_types must be {FULL}, got {given[-1]}")
    return tuple(given)


def _heads(data: Mapping[str, Any], types: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head size and key-value heads of every layer, from either dialect."""
    common = {"head_dim": _size(data, "head_dim"), "num_key_value_heads": _size(data, "num_key_value_heads")}
    per_layer = data.get("per_layer_config")
    if per_layer is None:
        override = {
            "head_dim": _size(data, "global_head_dim", default=512),
            "num_key_value_heads": _size(data, "num_global_key_value_heads", default=common["num_key_value_heads"]),
        }
        per_layer = {str(i): override for i, kind in enumerate(types) if kind == FULL}
    rows = [common] * len(types)
    for key, row in _object("text_config.per_layer_config", per_layer).items():
        where = f"text_config.per_layer_config.{key}"
        if key not in map(str, range(len(types))) or set(_object(where, row)) - set(common):
            raise ConfigError(f"config.json: {where} is {row!r:.80}, expected a layer's {' and '.join(common)}")
        rows[int(key)] = {name: _size(row, name, f"{where}.", default) for name, default in common.items()}
    return tuple(row["head_dim"] for row in rows), tuple(row["num_key_value_heads"] for row in rows)


def _ropes(data: Mapping[str, Any]) -> dict[str, Rope]:
    """Absent altogether they are Gemma's; within a given one, ``partial_rotary_factor`` defaults to 1."""
    gemma = {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    }
    given, ropes = _object("text_config.rope_parameters", data.get("rope_parameters") or gemma), {}
    for kind, standard in gemma.items():
        where = f"text_config.rope_parameters.{kind}"
        row, known = _object(where, given.get(kind)), standard["rope_type"]
        if row.get("rope_type") != known:
            raise ConfigError(
                f"config.json: {where}.rope_type is {row.get('rope_type')!r:.80}, only {known!r} is supported"
            )
        partial = _positive(row, "partial_rotary_factor", 1.0, f"{where}.")
        if partial > 1 or (kind == SLIDING and partial != 1):
            raise ConfigError(f"config.json: {where}.partial_rotary_factor is {partial}, not supported")
        factor = _positive(row, "factor", 1.0, f"{where}.") if kind == FULL else 1.0  # the default type has none
        ropes[kind] = Rope(float(_positive(row, "rope_theta", None, f"{where}.")), partial, float(factor))
    return ropes


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    where, optional = "vision_config.", ("standardize", "num_key_value_heads", "head_dim")
    names = [f.name for f in dataclasses.fields(VisionConfig) if f.name not in optional]
    sizes = {name: _size(data, name, where) for name in names}
    heads = sizes["num_attention_heads"]
    return VisionConfig(
        **sizes,
        num_key_value_heads=_size(data, "num_key_value_heads", where, heads),
        head_dim=_size(data, "head_dim", where, sizes["hidden_size"] // heads),
        standardize=bool(data.get("standardize", False)),
    )


FIXED = {  # what transformers would read and this network has built in
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": ("vision", None),
}


def _check(config: ModelConfig, data: Mapping[str, Any], text_data: Mapping[str, Any]) -> None:
    text = config.text
    for key, known in FIXED.items():
        if text_data.get(key, known[0]) not in known:
            raise ConfigError(
                f"config.json: text_config.{key} is {text_data[key]!r:.80}, only {known[0]!r} is supported"
            )
    if data.get("tie_word_embeddings", True) is not True:
        raise ConfigError("config.json: tie_word_embeddings is not true; only shared weights are supported")
    if text.top_k_experts > text.num_experts:
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
                raise OptionError(f"{name}={value!r:.80} must be a whole number of at least 1")
        if self.max_denoising_steps > MOST_STEPS:
            raise OptionError(f"max_denoising_steps={self.max_denoising_steps!r:.80} must be at most {MOST_STEPS:,}")
        for name in ("t_min", "t_max", "temperature"):
            _number(name, getattr(self, name), least=0)
        if self.t_max <= self.t_min:
            raise OptionError(f"t_max={self.t_max} must be greater than t_min={self.t_min}")
        if (self.t_min + (self.t_max - self.t_min) / self.max_denoising_steps) * (self.temperature or 1) < COLDEST:
            raise OptionError(f"temperature={self.temperature} is too small to divide by; 0 takes the likeliest token")
        _number("entropy_bound", self.entropy_bound, above=0)
        if self.confidence_threshold is not None:
            _number("confidence_threshold", self.confidence_threshold, above=0)
        stability = self.stability_threshold
        if stability is not None and (type(stability) is not int or stability < 0):
            raise OptionError(f"stability_threshold={stability!r:.80} must be a whole number of at least 0, or None")
        ends, pad = self.eos_token_ids, self.pad_token_id
        if not isinstance(ends, tuple) or not all(type(id) is int for id in ends):
            raise OptionError(f"eos_token_ids={ends!r} must be a tuple of token ids")
        if pad is not None and type(pad) is not int:
            raise OptionError(f"pad_token_id={pad!r} must be a token id or None")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ModelConfig) -> GenerationConfig:
        """Read generation_config.json; what it leaves out or sets to null takes the default, as in transformers."""
        file, sampler = "generation_config.json", data.get("sampler_config") or {}
        if not isinstance(sampler, Mapping) or sampler.get("_cls_name", SAMPLER) != SAMPLER:
            raise ConfigError(f"{file}: sampler_config is {sampler!r:.80}; only {SAMPLER!r} is supported")
        values = {
            name: data.get(name)
            for name in ("max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold")
        }
        values["max_tokens"] = data.get("max_new_tokens")
        values["entropy_bound"] = sampler.get("entropy_bound")
        given = {name: value for name, value in values.items() if value is not None}
        pad = _id("pad_token_id", data.get("pad_token_id"), file)
        try:
            return cls(
                **given,
                eos_token_ids=_ids("eos_token_id", data.get("eos_token_id"), file) or config.eos_token_ids,
                pad_token_id=config.pad_token_id if pad is None else pad,
            )
        except OptionError as error:
            raise ConfigError(f"{file}: {str(error).replace('max_tokens', 'max_new_tokens')}") from error

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
        raise OptionError(f"{name}={value!r:.80} must be a number {bound}")
