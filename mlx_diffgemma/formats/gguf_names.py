"""What GGUF calls the tensors: llama.cpp's names for the text model, and those of its image projectors (mmproj).

Two pull requests of llama.cpp define the architecture and differ in two names. #24423, which Unsloth's files follow, is
the one that is written; #24427 calls one norm otherwise and leaves the encoder's layer scalars out. Nothing is permuted
or shifted but the vision tower's patch embedding, which is a convolution there.
"""

from __future__ import annotations

import re

from ..config import ModelConfig
from ..tensors import DECODER, ENCODER, layer_name, tensor_table
from ..tensors import VISION as VISION_ROLES

ARCHITECTURE = "diffusion-gemma"
ARCHITECTURES = (ARCHITECTURE, "diffusion-gemma4", "diffusion_gemma", "diffusion_gemma4")
PROJECTOR, PROJECTOR_TYPE = "clip", "gemma4v"
ROPE = "rope_freqs.weight"  # made from the config by whoever needs it
ENCODER_SCALAR = "enc_layer_output_scale"
PATCHES = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
POSITIONS = "model.encoder.vision_tower.patch_embedder.position_embedding_table"

TEXT = {
    f"{DECODER}.embed_tokens.weight": "token_embd.weight",
    f"{DECODER}.norm.weight": "output_norm.weight",
    f"{DECODER}.self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    f"{DECODER}.self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    f"{DECODER}.self_conditioning.up_proj.weight": "self_cond_up.weight",
    f"{DECODER}.self_conditioning.down_proj.weight": "self_cond_down.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "layer_scalar": "layer_output_scale.weight",
}
OTHER_TEXT = {  # names that are read and never written
    "self_cond_norm.weight": f"{DECODER}.self_conditioning.pre_norm.weight",  # #24427
    "output.weight": "lm_head.weight",  # a head of its own, which must be the embedding
}
OTHER_LAYER = {  # gate and up apart, as other architectures have them
    "ffn_gate_exps.weight": "experts.switch_mlp.gate_proj.weight",
    "ffn_up_exps.weight": "experts.switch_mlp.up_proj.weight",
}
VISION = {
    "model.encoder.embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    PATCHES: "v.patch_embd.weight",
    POSITIONS: "v.position_embd.weight",
    "model.encoder.vision_tower.std_bias": "v.std_bias",
    "model.encoder.vision_tower.std_scale": "v.std_scale",
}
VISION_LAYER = {
    "input_layernorm.weight": "ln1.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ln2.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_proj.linear.weight": "attn_q.weight",
    "self_attn.k_proj.linear.weight": "attn_k.weight",
    "self_attn.v_proj.linear.weight": "attn_v.weight",
    "self_attn.o_proj.linear.weight": "attn_out.weight",
    "mlp.gate_proj.linear.weight": "ffn_gate.weight",
    "mlp.up_proj.linear.weight": "ffn_up.weight",
    "mlp.down_proj.linear.weight": "ffn_down.weight",
}


PLACES = (  # prefix of the canonical name, names behind it, prefix of GGUF's
    (re.compile(rf"{re.escape(DECODER)}\.layers\.(\d+)\."), LAYER, "blk"),
    (re.compile(rf"{re.escape(ENCODER)}\.layers\.(\d+)\."), {"layer_scalar": f"{ENCODER_SCALAR}.weight"}, "blk"),
    (re.compile(r"model\.encoder\.vision_tower\.encoder\.layers\.(\d+)\."), VISION_LAYER, "v.blk"),
)


def gguf_name(canonical: str) -> str:
    """What #24423 or an image projector calls a row of the tensor table."""
    for pattern, names, prefix in PLACES:
        if match := pattern.match(canonical):
            return f"{prefix}.{match[1]}.{names[canonical[match.end() :]]}"
    return (TEXT | VISION)[canonical]


def text_names(config: ModelConfig) -> dict[str, str]:
    """Canonical name -> GGUF's, of every text tensor of the model."""
    return {name: gguf_name(name) for name, row in tensor_table(config).items() if row.role not in VISION_ROLES}


def vision_names(config: ModelConfig) -> dict[str, str]:
    """The same for the vision tower and its projector; empty for a text model."""
    return {name: gguf_name(name) for name, row in tensor_table(config).items() if row.role in VISION_ROLES}


def readable_names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name -> canonical, of either pull request; the canonical one may be of a piece, or of a tied tensor."""
    found = {name: canonical for canonical, name in text_names(config).items()} | OTHER_TEXT
    for layer in range(config.text.num_hidden_layers):
        found |= {f"blk.{layer}.{name}": f"{layer_name(layer)}.{other}" for name, other in OTHER_LAYER.items()}
    return found
