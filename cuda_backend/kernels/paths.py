"""Which path a weight takes on which card when kernels are on. The README's table is this one; a test compares them."""

from __future__ import annotations

from mlx_diffgemma.formats.encoding import Encoding, dense, grouped

from ..linear import Quantized
from .cards import CARDS, Card
from .fp8_gemm import TORCHS
from .unpack import unsupported

FP8 = Encoding("fp8", "bfloat16", 8)
BLOCKS = Encoding("fp8", "bfloat16", 8, block=128)

# What is shown together -> one of them, and whether its activations are in FP8.
KINDS: dict[str, tuple[Encoding, bool]] = {
    "bfloat16": (dense(), False),
    "FP8 with a scale per row": (FP8, False),
    'the same, `activations="fp8"`': (FP8, True),
    "mxfp4, nvfp4": (grouped("nvfp4"), False),
    "affine 4 and 8 bits, mxfp8": (grouped("affine", bits=4, group_size=64), False),
    "affine 2, 3, 5, 6 bits": (grouped("affine", bits=3, group_size=64), False),
    "FP8 in blocks": (BLOCKS, False),
}


def path(encoding: Encoding, fp8_activations: bool, card: Card, *, experts: bool) -> str:
    """Who multiplies with a weight so stored, among the experts or elsewhere."""
    if not encoding.quantized:
        return "Triton" if experts else "cuBLAS"
    if fp8_activations and not card.fp8:
        return "refused"
    if fp8_activations:
        return "torch FP8" if TORCHS[card.sm] and not experts else "Triton FP8"
    return "plain" if unsupported(Quantized(encoding, (16, 16), {}), card) else "Triton"


def cell(kind: str, card: Card) -> str:
    """The path of attention and MLP, then that of the experts where it is another."""
    dense, experts = (path(*KINDS[kind], card, experts=experts) for experts in (False, True))
    return dense if dense == experts else f"{dense} / {experts}"


def paths(card: Card) -> dict[str, str]:
    """Of every kind of weight, for ``describe()``."""
    return {kind.replace("`", ""): cell(kind, card) for kind in KINDS}


def table() -> list[str]:
    """The lines of the README's table."""
    cards = list(CARDS.values())
    rows = [[kind, *(cell(kind, card) for card in cards)] for kind in KINDS]
    head = ["weights", *(f"sm_{card.sm} ({card.name})" for card in cards)]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
