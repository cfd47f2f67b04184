"""Tiny GGUF files, written by the gguf package alone: its writer, its quantizers, its names for Gemma 4's tensors.

The names and pairs that its tables lack are those of llama.cpp #24423's converter, or of #24427's. gguf cannot quantize
to K-quants; their blocks are random bytes with scales of a weight's size, and what they stand for is gguf's to say.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file, save_file

from tests.tiny import FULL, SLIDING, checkpoint

ARCH = "diffusion-gemma"
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64}  # rows are whole blocks of 32
WIDE = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256}  # and of 256
WIDE |= {"head_dim": 64, "global_head_dim": 128}
WIDE |= {"num_hidden_layers": 3, "layer_types": (SLIDING, SLIDING, FULL)}  # few, so that rounding grows little
FLAT = ("F32", "F16", "BF16")
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4")
MIXED = ("Q4_K_M", "Q6_K", "IQ4_XS")
KINDS = (*FLAT, *BLOCKS, *MIXED)

Arrays = dict[str, np.ndarray]
_TEXT = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 30)
_VISION = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 30)
_SELF = {"pre_norm": "self_cond_pre_norm", "gate_proj": "self_cond_gate", "up_proj": "self_cond_up"}
_SELF |= {"down_proj": "self_cond_down"}


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="gguf-")


def source(wide: bool = False) -> Path:
    """The checkpoint that the files are made from: float32, Hugging Face's layout."""
    return checkpoint(shape=tuple((WIDE if wide else SHAPE).items()))


def tensors(folder: Path) -> Arrays:
    return {n: a for path in sorted(folder.glob("*.safetensors")) for n, a in load_file(path).items()}


def text_name(name: str) -> str:
    """What llama.cpp's converter calls a text tensor."""
    if name.startswith("model.encoder.language_model."):
        return f"blk.{name.split('.')[4]}.enc_layer_output_scale.weight"
    if ".self_conditioning." in name:
        return _SELF[name.split(".")[-2]] + ".weight"
    name = name.replace("model.decoder.", "model.")
    layer = name.split(".")[2]
    if name.endswith("router.scale"):
        return f"blk.{layer}.ffn_gate_inp.scale"
    if name.endswith("per_expert_scale"):
        return f"blk.{layer}.ffn_down_exps.scale"
    if name.endswith("layer_scalar") or (".experts." in name and not name.endswith(".weight")):
        name += ".weight"
    found = _TEXT.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def vision_tensor(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    name = name.replace("model.encoder.vision_tower.encoder.", "vision_model.model.")
    name = name.replace("model.encoder.", "model.")
    if name.endswith("position_embedding_table"):
        name += ".weight"
    if name.endswith("patch_embedder.input_proj.weight"):
        edge = int((array.shape[1] // 3) ** 0.5)
        array = np.ascontiguousarray(array.reshape(-1, edge, edge, 3).transpose(0, 3, 1, 2))
    found = _VISION.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found, array


def is_vision(name: str) -> bool:
    return "vision" in name


def described(writer: gguf.GGUFWriter, config: Mapping) -> None:
    """The pairs that ``Gemma4Model.set_gguf_parameters`` and #24423 write."""
    text = config["text_config"]
    full = next(iter(text["per_layer_config"].values()))
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv([text["num_key_value_heads"] if s else full["num_key_value_heads"] for s in sliding])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_sliding_window(text["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_key_length_swa(text["head_dim"])
    writer.add_value_length_swa(text["head_dim"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["top_k_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_rope_dimension_count_swa(text["head_dim"])
    writer.add_causal_attention(False)
    writer.add_uint32("diffusion.canvas_length", config["canvas_length"])
    writer.add_uint32("diffusion.eb_max_steps", 48)
    writer.add_float32("diffusion.eb_t_min", 0.4)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list([f"token{i}" for i in range(text["vocab_size"])])
    writer.add_token_scores([-1000.0] * text["vocab_size"])
    writer.add_token_types([1] * text["vocab_size"])
    writer.add_token_merges(["t o", "to k"])
    writer.add_mask_token_id(4)


HALVES = {Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}


def random_blocks(shape: tuple[int, ...], kind: Type, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random codes, uint8 [..., row bytes], whose values have about this standard deviation.

    Only the float16 scales, at ``HALVES`` or the beginning of each block, are not left to chance. In Q4_K the scale of
    the minima is 7.5 times the other and each minimum is its group's scale, so that the mean is zero: weights with
    another mean add up and make a network in which every rounding grows.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    if kind == Type.Q4_K:  # 8 scales and 8 minima of 6 bits: bytes 4 to 16, as get_scale_min_k4 has them
        raw[..., 8:12] = raw[..., 4:8]
        raw[..., 12:16] = (raw[..., 12:16] & 15) * 17

    def scale(values: np.ndarray) -> None:
        for at in HALVES.get(kind, [0]):
            factor = 7.5 if kind == Type.Q4_K and at == 2 else 1
            raw[..., at : at + 2] = (factor * values).astype(np.float16)[..., None].view(np.uint8)

    scale(np.ones(raw.shape[:-1]))
    unit = float(gguf.dequantize(raw.reshape(*shape[:-1], -1), kind).std())
    scale(deviation / unit * rng.uniform(0.5, 1.5, raw.shape[:-1]))
    return raw.reshape(*shape[:-1], -1)


def type_of(kind: str, name: str, shape: tuple[int, ...]) -> Type:
    """Norms, scales and the router stay float32, as llama.cpp's converter keeps them."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Type.F32
    if kind != "Q4_K_M":
        return Type[kind]
    if "ffn_down" in name:  # not whole super-blocks in the 26B model
        return Type.Q8_0 if name.startswith(("blk.0", "blk.1")) else Type.Q5_0
    return Type.Q6_K if name.startswith(("token_embd", "self_cond_down")) or "attn_v" in name else Type.Q4_K


def coded(array: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    try:
        return gguf.quantize(np.ascontiguousarray(array, np.float32), kind)
    except NotImplementedError:
        return random_blocks(array.shape, kind, float(array.std()), rng)


Change = Callable[[Arrays], None]


def write(
    path: Path,
    kind: str,
    dense: Path,
    *,
    arch: str = ARCH,
    change: Change | None = None,
    pairs: Callable[[gguf.GGUFWriter], None] | None = None,
    splits: int = 0,
) -> Path:
    """One model file.

    Args:
        kind: the type of its matrices.
        change: alters the tensors by GGUF's names before they are quantized.
        pairs: adds or overwrites key-value pairs.
        splits: most tensors in a file; 0 for a single one.
    """
    arrays = {text_name(n): a for n, a in tensors(dense).items() if not is_vision(n)}
    arrays["rope_freqs.weight"] = np.array([1] * 4 + [1e30] * 12, np.float32)
    if change:
        change(arrays)
    writer, rng = gguf.GGUFWriter(path, arch, split_max_tensors=splits), np.random.default_rng(len(kind))
    described(writer, json.loads((dense / "config.json").read_text()))
    if pairs:
        pairs(writer)
    for name, array in arrays.items():
        wanted = type_of(kind, name, array.shape)
        writer.add_tensor(name, coded(array, wanted, rng), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_projector(path: Path, dense: Path, kind: str = "BF16", projector: str = "gemma4v") -> Path:
    """The vision tower as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.vision.projector_type", projector)
    writer.add_bool("clip.has_vision_encoder", True)
    for name, array in tensors(dense).items():
        if is_vision(name):
            found, array = vision_tensor(name, array)
            wanted = Type.F32 if array.ndim == 1 or "position_embd" in found else Type[kind]
            writer.add_tensor(found, coded(array, wanted, np.random.default_rng(0)), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def beside(folder: Path, dense: Path) -> Path:
    """A folder with the sidecars of ``dense``."""
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@functools.cache
def model(kind: str) -> Path:
    """The .gguf file of one kind, in a folder with its sidecars, written once per process."""
    dense = source(kind in MIXED)
    return write(beside(Path(_home().name) / kind, dense) / f"tiny-{kind}.gguf", kind, dense)


def values(*paths: Path) -> Arrays:
    """Every tensor of the files by its name there, float32, as the gguf package reads and dequantizes it."""
    found = {}
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            found[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
    return found


def dequantized(path: Path, folder: Path, dense: Path) -> Path:
    """A Hugging Face checkpoint of the values that the gguf package reads from ``path``."""
    beside(folder, dense)
    read, original = values(path), tensors(dense)
    save_file({n: a if is_vision(n) else read[text_name(n)] for n, a in original.items()}, folder / "model.safetensors")
    return folder


@functools.cache
def plain(kind: str) -> Path:
    """The folder of what ``model(kind)`` stands for, as a plain checkpoint."""
    return dequantized(model(kind), Path(_home().name) / f"plain-{kind}", source(kind in MIXED))


def bfloat16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)
