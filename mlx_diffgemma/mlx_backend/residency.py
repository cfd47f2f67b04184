"""What MLX may keep in memory: the model wired, and freed buffers only up to a limit.

MLX keeps what is freed for the next allocation of that size. Prompts of ever other lengths leave ever other sizes
behind, so without a limit a session that runs all day grows until the system pages. ``FREED`` holds what a step at
ordinary lengths takes and gives back; at tens of thousands of tokens, plain attention's scores alone are more.
"""

from __future__ import annotations

import mlx.core as mx

FREED = 2**30  # bytes


def settle() -> None:
    """Set both limits, on a GPU; MLX has one of each per process.

    Wiring keeps macOS from paging the weights out between two answers.
    """
    if mx.metal.is_available():
        mx.set_cache_limit(FREED)
        mx.set_wired_limit(working_set())


def working_set() -> int:
    """Bytes that Metal recommends to keep resident, and lets a process wire."""
    return int(mx.device_info()["max_recommended_working_set_size"])
