"""The GPU that kernels would run on: a Mac's, by the name of its chip, or what stands for one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from . import launch

PARAVIRTUAL = "Paravirtual"  # in the name of every GPU that a virtual machine shows: "Apple Paravirtual device"


@dataclass(frozen=True)
class Chip:
    """``name`` and ``architecture`` as MLX tells them: "Apple M4 Max", "applegpu_g16s"."""

    name: str
    architecture: str

    @property
    def virtual(self) -> bool:
        """A virtual machine's: it has no ``simdgroup_matrix``, and what works there says nothing about a chip."""
        return PARAVIRTUAL in self.name


EMULATED = Chip("a Metal emulator on the CPU", "")


def chip_here() -> Chip | None:
    """None where MLX computes on a CPU."""
    if launch.emulated():
        return EMULATED
    if not mx.metal.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return None
    about = mx.device_info(mx.gpu)
    return Chip(str(about["device_name"]), str(about["architecture"]))
