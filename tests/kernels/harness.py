"""Running kernels for tests: in the interpreter under several program orders, and listing them for compilation."""

from __future__ import annotations

import contextlib
import random

import torch
import triton.runtime.interpreter as interpreter

from cuda_backend.kernels.cards import CARDS, card_for

GPU = torch.cuda.is_available()
CARD = (
    card_for(int("".join(map(str, torch.cuda.get_device_capability())))) if GPU else CARDS[90]
)  # that kernels are for
SHORT = GPU and CARD.sm in (89, 90)  # tensor cores that sum FP8 in about 14 bits, between two additions in float32
ORDERS = ("forward", "reversed", "shuffled")


@contextlib.contextmanager
def program_order(order: str):
    """The interpreter runs the programs of a grid one after another; within, in ``order``.

    What a kernel computes must not depend on it: programs that read what others write give themselves away.
    """
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def permuted(x: int, y: int, z: int) -> None:
        dims = builder.grid_dim
        at, count = (x * dims[1] + y) * dims[2] + z, dims[0] * dims[1] * dims[2]
        if order == "reversed":
            at = count - 1 - at
        elif order == "shuffled":
            at = random.Random(count).sample(range(count), count)[at]
        original(at // (dims[1] * dims[2]), at // dims[2] % dims[1], at % dims[2])

    builder.set_grid_idx = permuted
    try:
        yield
    finally:
        del builder.set_grid_idx


def in_every_order(run):
    """``run()`` once per order; a tensor or a tuple of them, which must be bit-equal. The result is returned."""
    if GPU:  # there the hardware chooses: twice is all one can do
        results = [run(), run()]
    else:
        results = []
        for order in ORDERS:
            with program_order(order):
                results.append(run())
    first = flat(results[0])
    assert first, "nothing was returned"
    for other in results[1:]:
        for a, b in zip(first, flat(other), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "the result depends on the program order"
    return results[0]


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.contiguous()]
    fields = result if isinstance(result, (tuple, list)) else vars(result).values()
    return [tensor for field in fields if field is not None for tensor in flat(field)]


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest |found - truth| over the largest |truth|, in float64."""
    return ((found.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
