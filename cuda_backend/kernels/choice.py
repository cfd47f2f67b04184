"""Which kernels a model runs on, decided once, when it is loaded.

``auto`` turns a kernel on where ``proven.json`` has a row for it: its tests have passed on a GPU of this compute
capability, in this dtype, with these versions of torch and Triton. ``fused`` turns on all that there are for the card.
The rest runs on plain torch, and ``describe()`` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlx_diffgemma.backend import LoadOptions
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.proven import Row, Verdicts, covered, major_minor, read_rows, write_row

from ..linear import Quantized, Stack, Weight, takes_fp8
from ..weights import Weights
from . import jit
from .cards import CARDS, Card, card_for, listed
from .unpack import unsupported

KERNELS = (
    "norm",
    "after_attention",
    "after_experts",
    "heads",
    "geglu",
    "quantize",
    "fp8_linear",
    "packed_linear",
    "route",
    "experts",
    "canvas_attention",
    "chunk_attention",
    "look",
    "soft",
    "graph",  # a whole step, captured: see ``graphs.py``
)
PROVEN = Path(__file__).with_name("proven.json")


@dataclass(frozen=True)
class Gpu:
    """Where kernels would run. ``card`` is None where there are none for its compute capability."""

    name: str
    sm: int
    card: Card | None


INTERPRETER = Gpu("Triton's interpreter", 0, CARDS[90])  # kernels run as if for that card, on a CPU


class Choice(Verdicts):
    """What runs, and on which ``gpu``."""

    @property
    def gpu(self) -> Gpu | None:
        """``None`` without one."""
        return self.device

    @property
    def card(self) -> Card:
        assert self.gpu and self.gpu.card, "no kernel is on"
        return self.gpu.card

    def describe(self, **marks: Any) -> dict[str, Any]:
        return super().describe(**marks, **({"interpreted": True} if self.gpu is INTERPRETER else {}))


# ---- what there is


def gpu_of(device: torch.device, requested: str) -> Gpu | None:
    """The interpreter stands for one only where kernels are asked for by name."""
    if device.type != "cuda":
        return INTERPRETER if jit.INTERPRETED and requested == "fused" else None
    major, minor = torch.cuda.get_device_capability(device)
    sm = 10 * major + minor
    return Gpu(torch.cuda.get_device_name(device), sm, card_for(sm))


def check(options: LoadOptions, gpu: Gpu | None) -> None:
    """Whether what was asked for by name can be had at all.

    Raises:
        OptionError: ``fused`` without a GPU; FP8 where it would cost exactness and gain nothing.
        BackendError: ``fused`` without Triton, or on a GPU that no kernel was written for.
    """
    for name, value in options.chosen().items():
        if value == "fp8" and gpu and gpu.card and not gpu.card.fp8:
            raise OptionError(f"{name}='fp8': {gpu.name} (sm_{gpu.sm}) has no FP8 products; leave it out")
    if options.kernels != "fused":
        return
    if gpu is None:
        raise OptionError("kernels='fused': kernels need a CUDA GPU; leave it out, or use kernels='ops'")
    if not jit.AVAILABLE:
        raise BackendError("kernels='fused' needs Triton: pip install triton, or use kernels='ops'")
    if gpu.card is None:
        raise BackendError(
            f"kernels='fused': {gpu.name} has compute capability sm_{gpu.sm}, kernels are for {listed()}; "
            "leave it out, or use kernels='ops'"
        )


def why_not(kernel: str, requested: str, gpu: Gpu | None, dtype: str, proven: Sequence[Row]) -> str:
    """Why a kernel does not run, whatever the weights are; "" if it does."""
    if requested == "ops":
        return "as asked"
    if gpu is None or (gpu is INTERPRETER and kernel == "graph"):
        return "no GPU"
    if not jit.AVAILABLE:
        return "Triton is not installed"
    if gpu.card is None:
        return f"none for sm_{gpu.sm}, only for {listed()}"
    if requested == "fused" or is_proven(kernel, gpu.sm, dtype, proven):
        return ""
    return "available, unproven here"


# ---- what the weights need


def matrices(weights: Weights) -> Iterator[Weight]:
    """All that rows are multiplied with outside the experts; one by one where they are stored unlike."""
    mlps = [weights.self_conditioning, *(layer.mlp for layer in weights.layers)]
    joined = [weight for mlp in mlps for weight in (mlp.gate_up_proj, mlp.down_proj)]
    for layer in weights.layers:
        joined += [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.router.proj]
    for weight in joined:
        yield from weight.pieces if isinstance(weight, Stack) else (weight,)


def banks(weights: Weights) -> Iterator[tuple[Weight, Weight]]:
    for layer in weights.layers:
        yield layer.experts.gate_up_proj, layer.experts.down_proj


def packed(weights: Weights) -> list[Quantized]:
    """The matrices that are unpacked to be multiplied."""
    return [weight for weight in matrices(weights) if isinstance(weight, Quantized) and not takes_fp8(weight)]


def obstacle(pair: tuple[Weight, Weight], card: Card) -> str:
    """Why experts cannot run on kernels."""
    return unsupported(pair[0], card) or unsupported(pair[1], card)


def choose_kernels(
    gpu: Gpu | None,
    requested: str,
    dtype: torch.dtype,
    weights: Weights,
    proven: Sequence[Row] | None = None,
) -> Choice:
    """The kernels for ``weights``; those that they have no use for are not mentioned. ``check`` comes first."""
    name, rows = str(dtype).removeprefix("torch."), proven_rows() if proven is None else proven
    needed = set(KERNELS)
    if not any(map(takes_fp8, matrices(weights))):
        needed -= {"quantize", "fp8_linear"}
    if not packed(weights):
        needed -= {"packed_linear"}
    card = gpu.card if gpu else None
    reasons = {kernel: why_not(kernel, requested, gpu, name, rows) for kernel in KERNELS if kernel in needed}
    exceptions: dict[str, str] = {}
    if card:
        found = {
            "packed_linear": [unsupported(weight, card) for weight in packed(weights)],
            "experts": [obstacle(pair, card) for pair in banks(weights)],
        }
        for kernel, obstacles in found.items():
            if kernel in needed and requested != "ops" and obstacles and all(obstacles):
                reasons[kernel] = _unique(obstacles)
            elif reasons.get(kernel) == "" and any(obstacles):
                exceptions[kernel] = _unique(obstacles)
    if reasons["graph"] == "" and (reasons["experts"] or "experts" in exceptions):
        reasons["graph"] = "needs the kernel of the experts: torch's grouped product may wait for the host"
    return Choice(requested, gpu, reasons, exceptions)


def _unique(obstacles: Iterable[str]) -> str:
    return "; ".join(f"not for {obstacle}" for obstacle in sorted({*obstacles} - {""}))


# ---- what is proven


def proven_rows(path: Path = PROVEN) -> list[Row]:
    return read_rows(path)


def is_proven(kernel: str, sm: int, dtype: str, rows: Sequence[Row]) -> bool:
    return covered(key(kernel, sm, dtype), rows)


def key(kernel: str, sm: int, dtype: str) -> dict[str, Any]:
    """What a row must match to count here."""
    return {"kernel": kernel, "sm": sm, "dtype": dtype, **versions()}


def versions() -> dict[str, str]:
    """Of what compiles and what multiplies."""
    triton = getattr(jit.triton, "__version__", "0.0")
    return {name: major_minor(full) for name, full in (("torch", torch.__version__), ("triton", triton))}


def prove(kernel: str, dtype: str, path: Path = PROVEN) -> Row:
    """Write down that the tests of ``kernel`` have passed on the GPU in use, in place of an older row."""
    assert kernel in KERNELS, kernel
    assert not jit.INTERPRETED, "an interpreter proves nothing about a GPU"
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()), "auto")
    assert gpu is not None
    return write_row(path, key(kernel, gpu.sm, dtype), {"card": gpu.name})
