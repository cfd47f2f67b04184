"""Where the canvas attention kernel is expected to beat plain operations: one table. Nothing in it has been measured.

Counted for 16 query heads and 256 queries in 16 bits, per key (times B):

    plain   the scores, 8 KiB, pass through memory 6 times: written by two products, read and written by the join and
            by the softmax (8 KiB more is read above 4096 keys, where MLX's softmax reads twice), read by two
            products. Rows that differ in length add 2 passes. Twice 8 KiB is alive at once.
    kernel  none of it. Both read keys and values once from memory, 4 d bytes per key and key-value head.

So plain operations spend 12 bytes per score where the kernel spends nothing, but MLX's products run near the chip's
peak and a flash kernel runs below it: see ``needed_share``. Neither side grows faster with the length, hence the
length only decides (a) whether scores fit into the cache behind the GPU, so that their passes cost little, and (b) how
much memory they take. MLX's own source calls the unfused path the faster one at a head dimension of 256.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLAIN_BYTES = 12  # per score
FIRST_WITH_MATRIX_UNITS = 17  # the generation of M5


@dataclass(frozen=True)
class Rule:
    """From how many slots of the prefix on the kernel is chosen, ``None`` for never, and why."""

    least: int | None
    reason: str
    measured: bool = False


_SMALL_CACHE = "8 to 12 MB of cache hold 16 KiB per key for 512 to 768 keys: beyond, 74 % of the rate suffice"
_LARGE_CACHE = "a sliding layer has 1279 keys at most, and 24 MB of cache or more hold their scores"
_MEMORY = "about even in time (84 to 89 % of the rate needed), but scores take 16 KiB per key: 0.5 GiB are saved"
_MATRIX_UNITS = "MLX's products use units that simdgroup_matrix does not reach, several times as fast"

# By head dimension and family of chips; there is no fused kernel in MLX for 512, nor for 256 with 256 queries.
RULES = {
    (256, "base"): Rule(512, _SMALL_CACHE),
    (256, "pro-max"): Rule(None, _LARGE_CACHE),
    (256, "ultra"): Rule(None, _LARGE_CACHE),
    (256, "m5"): Rule(None, _MATRIX_UNITS),
    (512, "base"): Rule(32768, _MEMORY),
    (512, "pro-max"): Rule(32768, _MEMORY),
    (512, "ultra"): Rule(32768, _MEMORY),
    (512, "m5"): Rule(None, _MATRIX_UNITS),
}
SIZES = {"p": "base", "g": "base", "s": "pro-max", "c": "pro-max", "d": "ultra"}


def family(architecture: str) -> str | None:
    """Of what ``mx.device_info()["architecture"]`` says: applegpu_g16s is an M4 Pro or Max. ``None``: unknown."""
    found = re.fullmatch(r"applegpu_g(\d+)([a-z])", architecture)
    if found is None:
        return None
    return "m5" if int(found[1]) >= FIRST_WITH_MATRIX_UNITS else SIZES.get(found[2])


def kernel_wins(head_dim: int, keys: int, architecture: str) -> bool:
    """Whether ``auto`` takes the kernel for ``keys`` visible slots of the prefix."""
    kind = family(architecture)
    rule = RULES.get((head_dim, kind)) if kind else None
    return rule is not None and rule.least is not None and keys >= rule.least


def needed_share(head_dim: int, bandwidth: float, rate: float) -> float:
    """The share of the rate of MLX's products, ``rate`` operations per second, that makes the kernel as fast.

    A score costs 4 d operations either way, and 12 bytes of ``bandwidth`` in plain operations: 0.76 for 256 and 0.87
    for 512 on an M4 Max (546 GB/s, 14.5e12, which is 85 % of its peak).
    """
    products = 4 * head_dim / rate
    return products / (products + PLAIN_BYTES / bandwidth)
