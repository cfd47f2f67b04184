"""Apple's chips, as far as arithmetic about them needs it: how fast memory is read, and how fast products are made.

Bandwidth, GPU cores and largest memory are Apple's, from the press release and technical specifications of each chip in
its largest version; a chip with fewer cores or channels is slower in proportion. Rates are derived, for Apple does not
state them: a GPU core has 128 lanes, each makes one multiply-add per cycle (256 operations), in float16 as in float32
(philipturner/metal-benchmarks). Clocks are what third parties measured, and are good to some 5 %.

M5: matrix products run on the Neural Accelerators inside the GPU cores: 1,024 float16 operations per core and cycle, as
measured on an A19 (tzakharko, "Investigating the GPU Neural Accelerators"); which expects 70 TFLOP/s of an M5 Max.

All of these are peaks. MLX's products reach 60 to 70 % of them (4.0 to 4.4 of 6.4 TFLOP/s on an M3 Pro, by others).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError

GIGA = 1e9
LANES = 256  # float16 operations per GPU core and cycle, a multiply-add being two
ACCELERATED = 1024  # of an M5's core with its Neural Accelerator
SMALL_MEMORY = 36  # GB; up to here macOS lets a GPU wire two thirds, beyond it three quarters


@dataclass(frozen=True)
class Chip:
    """Bandwidth in GB/s, clock of the GPU in GHz, ``memory`` in GB: the most that it was sold with."""

    name: str
    bandwidth: float
    cores: int
    clock: float
    memory: int
    per_cycle: int = LANES

    @property
    def tflops(self) -> float:
        """float16, multiply-adds counted twice, in 10^12 per second."""
        return self.cores * self.per_cycle * self.clock / 1000

    def milliseconds(self, nbytes: float, operations: float) -> float:
        """What both take at least, side by side."""
        return 1e3 * max(nbytes / (self.bandwidth * GIGA), operations / (self.tflops * 1e12))

    def describe(self) -> dict[str, float | int | str]:
        return {
            "name": self.name,
            "bandwidth": self.bandwidth,
            "cores": self.cores,
            "memory": self.memory,
            "tflops": round(self.tflops, 2),
        }


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("m1", 68.25, 8, 1.278, 16),
        Chip("m1-pro", 200, 16, 1.296, 32),
        Chip("m1-max", 400, 32, 1.296, 64),
        Chip("m1-ultra", 800, 64, 1.296, 128),
        Chip("m2", 100, 10, 1.398, 24),
        Chip("m2-pro", 200, 19, 1.398, 32),
        Chip("m2-max", 400, 38, 1.398, 96),
        Chip("m2-ultra", 800, 76, 1.398, 192),
        Chip("m3", 100, 10, 1.398, 24),
        Chip("m3-pro", 150, 18, 1.398, 36),
        Chip("m3-max", 400, 40, 1.398, 128),
        Chip("m3-ultra", 819, 80, 1.398, 512),
        Chip("m4", 120, 10, 1.578, 32),
        Chip("m4-pro", 273, 20, 1.578, 64),
        Chip("m4-max", 546, 40, 1.578, 128),
        Chip("m5", 153, 10, 1.74, 32, ACCELERATED),
        Chip("m5-pro", 307, 20, 1.74, 64, ACCELERATED),
        Chip("m5-max", 614, 40, 1.74, 128, ACCELERATED),
    )
}
MEMORIES = (16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB, of Macs that were sold


def chip(name: str) -> Chip:
    """By name, as ``m4-max``, ``M4 Max`` or ``Apple M4 Max``.

    Raises:
        OptionError: none of that name; lists them.
    """
    key = name.lower().removeprefix("apple").strip().replace(" ", "-").replace("_", "-")
    if key not in CHIPS:
        raise OptionError(f"chip {name!r} is unknown; choose one of {', '.join(CHIPS)}")
    return CHIPS[key]


def wired(memory: float) -> float:
    """Bytes that the GPU of a Mac with ``memory`` GB may keep resident, as macOS sets it by default.

    A rule of thumb: on the machine itself ``mx.device_info()["max_recommended_working_set_size"]`` says what holds, and
    ``sysctl iogpu.wired_limit_mb`` changes it.
    """
    return memory * 2**30 * (2 / 3 if memory <= SMALL_MEMORY else 3 / 4)


def smallest(nbytes: float) -> int | None:
    """GB of the smallest Mac whose GPU may keep ``nbytes`` resident, ``None`` when none may."""
    return next((memory for memory in MEMORIES if wired(memory) >= nbytes), None)
