"""Which kernels a model runs on, decided once, when it is loaded.

``auto`` turns a kernel on where ``proven.json`` has a row for it: its tests have passed on this chip, in this dtype,
with this version of MLX. ``fused`` turns on all that the GPU can run. The rest are plain MLX operations, and
``describe()`` says why.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...config import TextConfig
from ...errors import OptionError
from ...proven import Row, Verdicts, covered, major_minor, matches, read_rows, write_row
from ..linear import Linear
from .attention import Visible, canvas_attention_kernel, canvas_attention_ops
from .attention_rule import RULES, family, kernel_wins
from .chip import EMULATED, Chip, chip_here
from .ops import KERNELS, Ops, with_kernels
from .soft_embed import gathers

PROVEN = Path(__file__).with_name("proven.json")
MATRICES = ("canvas_attention",)  # kernels that need simdgroup_matrix, which a virtual machine's GPU lacks


class Choice(Verdicts):
    """What runs, and on which ``chip``."""

    @property
    def chip(self) -> Chip | None:
        """``None`` where MLX computes on a CPU."""
        return self.device

    def describe(self, **marks: Any) -> dict[str, Any]:
        return super().describe(**marks, **({"emulated": True} if self.chip is EMULATED else {}))


# ---- what there is


def check(requested: str) -> None:
    """Whether what was asked for by name can be had at all.

    Raises:
        OptionError: ``fused`` where there is no Metal.
    """
    if requested == "fused" and chip_here() is None:
        raise OptionError("kernels='fused': kernels need a Mac's GPU; leave it out, or use kernels='ops'")


def why_not(kernel: str, requested: str, chip: Chip | None, dtype: str, proven: Sequence[Row]) -> str:
    """Why a kernel does not run, whatever the model is; "" if it does."""
    if requested == "ops":
        return "as asked"
    if chip is None:
        return "no Metal GPU"
    if chip.virtual and kernel in MATRICES:
        return "needs simdgroup_matrix, which a virtual machine's GPU lacks"
    if requested == "fused" or covered(key(kernel, chip, dtype), proven):
        return ""
    return "available, unproven here"


def choose_kernels(
    requested: str,
    dtype: mx.Dtype,
    config: TextConfig,
    table: Linear,
    *,
    self_conditioning: str = "dense",
    proven: Sequence[Row] | None = None,
) -> Choice:
    """The kernels for a model whose embedding is ``table``; those that it has no use for are not mentioned.

    Raises:
        OptionError: see ``check``.
    """
    check(requested)
    chip, rows = chip_here(), read_rows(PROVEN) if proven is None else proven
    name, survivors = str(dtype).rpartition(".")[2], self_conditioning == "survivors"
    needed = [kernel for kernel in KERNELS if survivors or kernel != "survivors"]
    reasons = {kernel: why_not(kernel, requested, chip, name, rows) for kernel in needed}
    obstacle = gathers(table) if survivors and requested != "ops" else ""
    if obstacle:
        reasons["survivors"] = f"not for {obstacle}"
    exceptions: dict[str, str] = {}
    if requested == "auto" and chip and reasons["canvas_attention"] == "":
        least = {dim: least_keys(dim, chip.architecture) for dim in sorted({*config.head_dims})}
        if all(keys is None for keys in least.values()):
            reasons["canvas_attention"] = "plain operations are expected to be as fast here"
        elif any(least.values()):
            exceptions["canvas_attention"] = "; ".join(
                f"not for heads of {dim}" if keys is None else f"heads of {dim} from {keys} tokens on"
                for dim, keys in least.items()
            )
    return Choice(requested, chip, reasons, exceptions)


# ---- the table of operations


def least_keys(head_dim: int, architecture: str) -> int | None:
    """From how many tokens on the rule takes the kernel of attention; ``None``: never."""
    rule = RULES.get((head_dim, family(architecture) or ""))
    return None if rule is None else rule.least


def build_ops(choice: Choice) -> Ops:
    """Kernels in the places that were chosen, plain MLX in the rest."""
    ops = with_kernels(choice.fused)
    if choice.requested != "auto" or not choice.on("canvas_attention"):
        return ops
    assert choice.chip is not None
    return replace(ops, canvas_attention=functools.partial(attention, architecture=choice.chip.architecture))


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    prefix_k: mx.array,
    prefix_v: mx.array,
    visible: Visible,
    *,
    architecture: str,
) -> mx.array:
    """As ``canvas_attention_ops``, by the kernel where the rule says that it is quicker."""
    wins = kernel_wins(q.shape[-1], visible.extent, architecture)
    operation = canvas_attention_kernel if wins else canvas_attention_ops
    return operation(q, k, v, prefix_k, prefix_v, visible)


# ---- what is proven


def key(kernel: str, chip: Chip, dtype: str) -> dict[str, str]:
    """What a row must match to count here."""
    return {"kernel": kernel, "chip": chip.name, "dtype": dtype, **versions()}


def versions() -> dict[str, str]:
    return {"mlx": major_minor(mx.__version__)}  # type: ignore[attr-defined]  # no stub has it


def prove(kernel: str, dtype: str, path: Path = PROVEN) -> Row:
    """Write down that the tests of ``kernel`` have passed on the chip in use, in place of an older row."""
    assert kernel in KERNELS, kernel
    chip = chip_here()
    assert chip is not None and chip is not EMULATED, "a CPU proves nothing about a GPU"
    assert not chip.virtual, "a virtual machine proves nothing about a chip"
    about = {"architecture": chip.architecture, "macos": platform.mac_ver()[0]}
    return write_row(path, key(kernel, chip, dtype), about)


def proven_here(path: Path = PROVEN) -> list[Row]:
    """The rows of the chip in use, with this version of MLX."""
    chip = chip_here()
    return [] if chip is None else [row for row in read_rows(path) if matches(row, {"chip": chip.name, **versions()})]
