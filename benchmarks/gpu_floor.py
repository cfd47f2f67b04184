"""What a denoising step must cost at least: bytes over bandwidth, operations over the rate of the unit that does them.

    python -m benchmarks.gpu_floor [CARD]

A step is cut into ``PARTS``. Each is charged the larger of its two times, and the parts are added up, for they follow
one another. Bytes are those that cannot lie in a cache: every weight once, the prefix's keys and values once; what
passes from one operation to the next (a few megabytes) stays in the L2 cache and is free. The embedding counts twice,
for the soft embedding needs all logits of its step. The floor has two products over the vocabulary. An implementation
that keeps no logits, as ours, multiplies a third time, and with an FP8 head reads the second pass's values in bfloat16:
its soft part shows both.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convert.recipes import RECIPES, Recipe
from mlx_diffgemma.config import ModelConfig, TextConfig
from mlx_diffgemma.formats.encoding import Encoding, dense
from mlx_diffgemma.tensors import Tensor, tensor_table

PUBLISHED = Path(__file__).parents[1] / "mlx_diffgemma" / "fixtures" / "diffusiongemma-26B-A4B-it.json"
PARTS = ("experts", "linears", "attention", "head", "soft", "rows", "tail")
# What a result calls a precision, and the recipe of ``convert`` that makes such a checkpoint.
PRECISIONS = {"bf16": "bf16", "fp8": "fp8", "4bit": "experts4-fp8"}
HEADS = {"bf16": dense(), "fp8": Encoding("fp8")}
ROLES = {"experts": "experts", "attention": "linears", "mlp": "linears", "self_conditioning": "soft"}
SMALL = ("norm", "router", "scalar")
NOISE = 28  # bytes per position: a step's uniform number and fresh token in, the view out
GIGA = 1e9


@dataclass(frozen=True)
class Gpu:
    """Published rates without sparsity.

    Args:
        pattern: of ``torch.cuda.get_device_name``.
        bandwidth: bytes per second.
        bf16, fp8: operations per second with float32 sums; ``fp8`` is 0 where there is no such unit.
        source: where the figures stand.
    """

    pattern: str
    bandwidth: float
    bf16: float
    fp8: float
    source: str

    def rate(self, fp8: bool) -> float:
        """Weights in FP8 are multiplied in bfloat16 where the card cannot do better."""
        return self.fp8 if fp8 and self.fp8 else self.bf16


GPUS = {
    "H100 SXM": Gpu("H100 80GB HBM3", 3.35e12, 989e12, 1979e12, "NVIDIA H100 data sheet; half of the sparse rates"),
    "H200": Gpu(r"H200(?! NVL)", 4.8e12, 989e12, 1979e12, "NVIDIA H200 data sheet; half of the sparse rates"),
    "A100 80GB": Gpu("A100-SXM4-80GB", 2.039e12, 312e12, 0, "NVIDIA A100 data sheet, 80 GB SXM"),
    "B200": Gpu("B200", 8e12, 2250e12, 4500e12, "NVIDIA HGX B200, an eighth of the system; half of the sparse rates"),
    "RTX 5090": Gpu(
        "RTX 5090(?! D| Laptop)", 1.792e12, 209.5e12, 419e12, "NVIDIA RTX Blackwell white paper, appendix A"
    ),
    "RTX 4090": Gpu("RTX 4090(?! D| Laptop)", 1.008e12, 165.2e12, 330.3e12, "NVIDIA Ada white paper, appendix A"),
    "L4": Gpu(r"\bL4\b", 0.3e12, 121e12, 242.5e12, "NVIDIA L4 data sheet; half of the sparse rates"),
}


@dataclass(frozen=True)
class Cost:
    """``nbytes`` moved and operations by unit; an add and a multiply are two operations."""

    nbytes: float = 0.0
    bf16: float = 0.0
    fp8: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.bf16 + other.bf16, self.fp8 + other.fp8)

    def milliseconds(self, gpu: Gpu) -> float:
        compute = self.bf16 / gpu.rate(False) + self.fp8 / gpu.rate(True)
        return 1000 * max(self.nbytes / gpu.bandwidth, compute)


@dataclass(frozen=True)
class Load:
    """What is asked of a model: ``batch`` canvases, each behind ``prompt`` tokens."""

    config: ModelConfig
    recipe: Recipe
    head: Encoding = dense()  # noqa: RUF009
    batch: int = 1
    prompt: int = 1024

    @property
    def rows(self) -> int:
        return self.batch * self.config.canvas_length


def published() -> ModelConfig:
    """The 26B model's configuration."""
    return ModelConfig.from_dict(json.loads(PUBLISHED.read_text()))


def load_of(config: ModelConfig, precision: str, head: str, batch: int = 1, prompt: int = 1024) -> Load:
    return Load(config, RECIPES[PRECISIONS[precision]], HEADS[head], batch, prompt)


def costs(load: Load) -> dict[str, Cost]:
    """What every part of a step costs."""
    text = load.config.text
    found = dict.fromkeys(PARTS, Cost())
    for row in tensor_table(load.config).values():
        for part, cost in _weights(row, load):
            found[part] += cost
    found["attention"] = _attention(text, load)
    found["tail"] = Cost(NOISE * load.rows)
    return found


def _weights(row: Tensor, load: Load) -> Iterator[tuple[str, Cost]]:
    text = load.config.text
    if row.role == "embedding":
        # once to the logits, once from the probabilities; the rows of the canvas's ids are nothing beside that
        yield "head", _product(row, load.head, load.rows)
        yield "soft", _product(row, load.head, load.rows)
    elif row.role == "experts":
        share = touched(text, load.rows)
        cost = _product(row, encoding_of(row, load), load.rows * text.top_k_experts / text.num_experts)
        yield "experts", Cost(cost.nbytes * share, cost.bf16, cost.fp8)
    elif row.role in ROLES or row.role in SMALL:
        matrix = len(row.shape) == 2
        part = ROLES.get(row.role, "rows") if matrix else "rows"
        yield part, _product(row, encoding_of(row, load), load.rows if matrix else 0)


def encoding_of(row: Tensor, load: Load) -> Encoding:
    return load.recipe.wanted(row, load.config.text.num_hidden_layers) or dense()


def _product(row: Tensor, encoding: Encoding, rows: float) -> Cost:
    """``rows`` rows times the whole tensor. With one scale per row of an FP8 weight the product itself is in FP8."""
    operations = 2 * rows * row.size
    fp8 = encoding.mode == "fp8" and not encoding.block
    return Cost(encoding.nbytes(row.shape), 0 if fp8 else operations, operations if fp8 else 0)


def touched(text: TextConfig, rows: int) -> float:
    """The expected share of experts that at least one of ``rows`` tokens visits, when all are equally likely."""
    return 1 - (1 - text.top_k_experts / text.num_experts) ** rows


def _attention(text: TextConfig, load: Load) -> Cost:
    """Scores and values of every query; the prefix's keys and values are read, the canvas's own are in the cache."""
    total = Cost()
    for layer in range(text.num_hidden_layers):
        prefix = load.prompt if text.full(layer) else min(load.prompt, text.window_keys)
        slot = 2 * text.num_key_value_heads[layer] * text.head_dims[layer]
        keys = prefix + load.config.canvas_length
        operations = 4 * load.rows * keys * text.num_attention_heads * text.head_dims[layer]
        total += Cost(load.batch * prefix * slot * dense().nbytes((1,)), operations)
    return total


def floors(load: Load, gpu: Gpu) -> dict[str, float]:
    """Milliseconds per part; their sum is the floor of a step."""
    return {part: cost.milliseconds(gpu) for part, cost in costs(load).items()}


def gpu_named(name: str) -> str | None:
    """The row of ``GPUS`` that a device is, by the name that its driver gives it."""
    return next((key for key, gpu in GPUS.items() if re.search(gpu.pattern, name)), None)


def table(gpu: Gpu, config: ModelConfig) -> str:
    lines = [f"{'precision':<10}{'head':<6}{'GB':>7}{'ms':>7}   " + "".join(f"{part:>10}" for part in PARTS)]
    for precision in PRECISIONS:
        for head in HEADS:
            load = load_of(config, precision, head)
            found = floors(load, gpu)
            gigabytes = sum(cost.nbytes for cost in costs(load).values()) / GIGA
            row = f"{precision:<10}{head:<6}{gigabytes:>7.2f}{sum(found.values()):>7.2f}   "
            lines.append(row + "".join(f"{found[part]:>10.3f}" for part in PARTS))
    return "\n".join(lines)


def main() -> None:
    chosen = sys.argv[1:] or list(GPUS)
    for name in chosen:
        if name not in GPUS:
            raise SystemExit(f"no figures for {name!r}; there are {', '.join(GPUS)}")
        print(f"{name}, batch 1, 1,024 tokens ({GPUS[name].source})\n{table(GPUS[name], published())}\n")


if __name__ == "__main__":
    main()
