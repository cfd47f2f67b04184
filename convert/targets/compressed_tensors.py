"""compressed-tensors, for vLLM: FP8 in RedHatAI's layout, and NVFP4 experts beside it.

Every expert is a module of its own, gate and up apart. FP8 is ``weight`` e4m3 and ``weight_scale`` [out, 1], with
activations quantized as they come (W8A8, dynamic). NVFP4 is ``weight_packed``, ``weight_scale`` and
``weight_global_scale`` [1], a divisor: ours is a factor, and its reciprocal is rounded to float32. Its activations stay
as they are (W4A16): quantizing them would need a calibration. vLLM takes one global scale for gate and up, and those of
one bank that this library quantized are equal; it has no quantized self-conditioning, routers or embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.formats.assemble import module_name
from mlx_diffgemma.formats.encoding import Encoded, Encoding
from mlx_diffgemma.formats.schemes import E4M3, SOURCE, U8
from mlx_diffgemma.tensors import DECODER, ENCODER, Tensor

from ..dialect import googles, norm_dtype
from ..target import Output

VERSION = "0.15.1"  # of compressed-tensors, whose layout this is
ROLES = ("experts", "attention", "mlp")
LINEAR = re.compile(r".*(proj|projection|linear)")
FP8, NVFP4 = "float-quantized", "nvfp4-pack-quantized"
TARGETS = {  # as vLLM asks for modules, whatever it calls their parents
    "experts": r"re:.*\.experts\..*_proj$",
    "self_attn": r"re:.*\.self_attn\.[qkvo]_proj$",
    "mlp": r"re:.*\.mlp\.(gate|up|down)_proj$",
}


class CompressedTensors:
    name: str = "compressed-tensors"
    metadata: Mapping[str, str] = {"format": "pt"}
    names: Mapping[str, str] = {}

    def holds(self, row: Tensor, encoding: Encoding) -> bool:
        if not encoding.quantized:
            return True
        if row.role not in ROLES or not encoding.fits(row.shape):
            return False
        if encoding.mode == "nvfp4":
            return encoding.global_scale and row.role == "experts"
        return encoding.mode == "fp8" and not encoding.block and encoding.dtype in ("bfloat16", "float32")

    def outputs(self, row: Tensor, encoding: Encoding) -> list[Output]:
        if not encoding.quantized:
            return [Output(row.name, *encoding.parts(row.shape)["weight"])]
        names = [module_name(row.name)] if row.role != "experts" else _names(row, range(row.shape[0]))
        shape = (row.size // row.shape[-1] // len(names), row.shape[-1])
        return [Output(f"{name}.{part}", *what) for name in names for part, what in _parts(encoding, shape).items()]

    def emit(self, row: Tensor, start: int, encoded: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
        if not encoded.encoding.quantized:
            yield row.name, start, encoded.parts["weight"]
        elif row.role != "experts":
            for part, array in zip(("weight", "weight_scale"), _arrays(encoded), strict=True):
                yield f"{module_name(row.name)}.{part}", start, array
        else:
            for index in range(encoded.shape[0]):
                yield from _expert(row, start + index, encoded, index)

    def config(self, config: Mapping[str, Any], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
        found = googles(config, norm_dtype(encodings))
        formats = {name: NVFP4 if e.mode == "nvfp4" else FP8 for name, e in encodings.items() if e.quantized}
        if formats:
            found["quantization_config"] = _quantization(formats, encodings)
        return found


def _names(row: Tensor, experts: range) -> list[str]:
    """The modules of a bank: an expert's gate, then its up, or its down."""
    base, _, which = row.name.rpartition(".")
    halves = ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,)
    return [f"{base}.{expert}.{half}" for expert in experts for half in halves]


def _parts(encoding: Encoding, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of one module [out, in]."""
    rows, width = shape
    if encoding.mode == "fp8":
        return {"weight": (shape, E4M3), "weight_scale": encoding.parts(shape)["scales"]}
    return {
        "weight_packed": ((rows, width // 2), U8),
        "weight_scale": ((rows, width // 16), E4M3),
        "weight_global_scale": ((1,), np.dtype(np.float32)),
    }


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    """The parts of one module, or of a range of its rows, as the file has them; in the order of ``_parts``."""
    parts = {name: np.ascontiguousarray(array) for name, array in encoded.parts.items()}
    if encoded.encoding.mode == "fp8":
        return [parts["weight"].view(E4M3), parts["scales"]]
    return [parts["weight"].view(U8), parts["scales"].view(E4M3), reciprocal(parts["global_scale"][:1])]


def _expert(row: Tensor, expert: int, encoded: Encoded, index: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """All parts of one expert of a bank, which is the range's ``index``-th."""
    names = _names(row, range(expert, expert + 1))
    rows = encoded.shape[1] // len(names)
    for half, name in enumerate(names):
        cut = {part: array[index, half * rows : (half + 1) * rows] for part, array in encoded.parts.items()}
        if "global_scale" in cut and (cut["global_scale"] != cut["global_scale"][0]).any():
            raise CheckpointError(
                f"{name} has more than one global scale, which compressed-tensors cannot hold; convert from {SOURCE}"
            )
        matrix = Encoded(encoded.encoding, (rows, encoded.shape[-1]), cut)
        for part, array in zip(_parts(matrix.encoding, matrix.shape), _arrays(matrix), strict=True):
            yield f"{name}.{part}", 0, array


def reciprocal(factor: np.ndarray) -> np.ndarray:
    """The float32 divisor whose float32 reciprocal is ``factor``, or the nearest where none is: one ulp away."""
    first = np.float32(1) / factor
    near = (first, np.nextafter(first, np.float32(0)), np.nextafter(first, np.float32(np.inf)))
    return np.select([np.float32(1) / divisor == factor for divisor in near], near, first).astype(np.float32)


def _quantization(formats: Mapping[str, str], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
    """``quantization_config`` for the formats of the quantized rows."""
    used = sorted(set(formats.values()), reverse=True)  # experts are asked for before "Linear" would take them
    targets = {kind: _targets(kind, formats) if len(used) > 1 else ["Linear"] for kind in used}
    return {
        "config_groups": {f"group_{i}": GROUPS[kind] | {"targets": targets[kind]} for i, kind in enumerate(used)},
        "format": used[0] if len(used) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": _ignored(encodings),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _targets(kind: str, formats: Mapping[str, str]) -> list[str]:
    """Patterns of the modules of one format; by name where not all of a sort have it."""
    found: list[str] = []
    for sort, pattern in TARGETS.items():
        rows = [name for name in formats if f".{sort}." in name]
        mine = [name for name in rows if formats[name] == kind]
        if mine and mine == rows:
            found.append(pattern)
        else:
            found += [_bank(name) if sort == "experts" else module_name(name) for name in mine]
    return found


def _bank(name: str) -> str:
    """A pattern of all modules of one bank."""
    layer, which = name.split(".")[3], name.rpartition(".")[2]
    halves = "(gate|up)_proj" if which == "gate_up_proj" else which
    return rf"re:.*\.layers\.{layer}\..*experts\..*{halves}$"


def _ignored(encodings: Mapping[str, Encoding]) -> list[str]:
    """All linear layers that are dense, under every name that a loader has for them."""
    dense = [module_name(name) for name, encoding in encodings.items() if not encoding.quantized]
    linear = [module for module in dense if LINEAR.fullmatch(module) and ".experts." not in module]
    shared = [m.replace(DECODER, ENCODER, 1) for m in linear if m.startswith(f"{DECODER}.layers.")]
    banks = [_bank(module) for module in dense if ".experts." in module]
    text = [module for module in linear if module.startswith(DECODER)]
    return [*shared, *(module for module in linear if module not in text), *text, *banks, "lm_head"]


NOTHING: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "observer_kwargs": {},
    "symmetric": True,
    "type": "float",
}
GROUPS: dict[str, dict[str, Any]] = {
    FP8: {
        "format": FP8,
        "input_activations": NOTHING
        | {"dynamic": True, "group_size": None, "num_bits": 8, "observer": None, "strategy": "token"}
        | {"scale_dtype": None, "zp_dtype": None},
        "output_activations": None,
        "weights": NOTHING
        | {"dynamic": False, "group_size": None, "num_bits": 8, "observer": "memoryless_minmax", "strategy": "channel"}
        | {"scale_dtype": None, "zp_dtype": None},
    },
    NVFP4: {
        "format": NVFP4,
        "input_activations": None,
        "output_activations": None,
        "weights": NOTHING
        | {"dynamic": False, "group_size": 16, "num_bits": 4, "observer": "memoryless_minmax"}
        | {"scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group", "zp_dtype": "torch.float8_e4m3fn"},
    },
}
