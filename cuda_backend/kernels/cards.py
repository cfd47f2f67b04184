"""What each kind of NVIDIA GPU can do, as far as a kernel must know it. One row per compute capability.

A capability that is not listed has no kernels: nothing was ever compiled for it, so nothing is guessed.

``shared`` is what one thread block may have (CUDA programming guide, table of technical specifications per compute
capability). ``fp8``: whether tensor cores and compiler know e4m3, else FP8 weights are unpacked on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Args:
        sm: compute capability, 90 for 9.0.
        name: what is sold with it.
        shared: bytes of shared memory that a thread block may use.
        processors: streaming multiprocessors of the largest card of the row; a work split is chosen by it.
        fp8: e4m3 products on tensor cores.
    """

    sm: int
    name: str
    shared: int
    processors: int
    fp8: bool


CARDS = {
    card.sm: card
    for card in (
        Card(80, "A100", 163 * KIB, 108, fp8=False),
        Card(89, "L4, L40S, RTX 40", 99 * KIB, 128, fp8=True),
        Card(90, "H100, H200", 227 * KIB, 132, fp8=True),
        Card(100, "B200", 227 * KIB, 148, fp8=True),
        Card(120, "RTX 50, RTX PRO 6000", 99 * KIB, 188, fp8=True),
    )
}

ALIKE = {103: 100, 121: 120}  # B300 as B200, GB10 (DGX Spark) as RTX 50: the same limits, compiled for what they are


def card_for(sm: int) -> Card | None:
    """The row by which kernels are cut up on a GPU of this compute capability."""
    return CARDS.get(ALIKE.get(sm, sm))


def listed() -> str:
    """All compute capabilities that have kernels, for a person."""
    return ", ".join(f"sm_{sm}" for sm in sorted({*CARDS, *ALIKE}))
