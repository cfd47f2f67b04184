"""ModelOpt checkpoints: nvidia's NVFP4, and FP8. config.json describes them, or hf_quant_config.json beside it.

Names are Hugging Face's, with one module per expert. NVFP4: ``weight`` uint8, two codes to a byte; ``weight_scale``
e4m3; ``weight_scale_2`` float32, which multiplies. FP8: ``weight`` e4m3; ``weight_scale`` float32, one for the tensor.
How a module is stored is told by its parts; the patterns of ``ignore`` are advice for other loaders. Activations and
the cache are not quantized here, so their scales are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .assemble import Parts
from .hf import dense_part
from .schemes import E4M3, E8M0, U8, fp8, microscaled, nvfp4, refuse, take
from .stored import Stored

UNUSED = frozenset({"input_scale", "output_scale", "k_scale", "v_scale"})
SMOOTHED = "pre_quant_scale"


@dataclass(frozen=True)
class ModelOpt:
    """``algorithm`` is for messages."""

    algorithm: str
    name: str = "ModelOpt"
    suffixes: frozenset[str] = UNUSED | {"weight", "weight_scale", "weight_scale_2", SMOOTHED}
    partial: bool = True

    def stored(self, shape: tuple[int, ...], parts: Parts) -> Stored:
        used = {kind: part for kind, part in parts.items() if kind not in UNUSED} or parts
        if set(used) == {"weight"} and used["weight"].dtype not in (E4M3, U8):
            return dense_part(shape, used["weight"])
        if SMOOTHED in used:
            refuse(used[SMOOTHED], "scales the inputs, as AWQ does, which this library does not")
        weight, scale = take(used, "weight", "weight_scale", optional=("weight_scale_2",))
        if "weight_scale_2" in used or (weight.dtype == U8 and scale.dtype == E4M3):
            return nvfp4(shape, *take(used, "weight", "weight_scale", "weight_scale_2"))
        take(used, "weight", "weight_scale")
        if scale.dtype in (U8, E8M0) and weight.dtype in (U8, E4M3):
            return microscaled(shape, "mxfp4" if weight.dtype == U8 else "mxfp8", weight, scale)
        if weight.dtype != E4M3:
            refuse(weight, f"is {weight.dtype} with a {scale.dtype} scale ({self.algorithm}), which is not read")
        return fp8(shape, weight, scale)

    def ignored(self, name: str) -> bool:
        return name.rpartition(".")[2] in UNUSED


def dialect(method: Mapping[str, Any]) -> ModelOpt:
    return ModelOpt(f"quant_algo {method.get('quant_algo')!r:.40}")
