"""From the text of a Metal function to a function of this machine: C++ by a few changes (translate.py), then clang.

clang comes with the package ziglang; ``CXX_METAL_CPU`` names another one (17 or newer), for example ``clang++-19``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .translate import NotMetal, signature, translated

HERE = Path(__file__).parent
LIBRARY, ENGINE = HERE / "msl", HERE / "engine"
BUILD = HERE.parents[1] / "build" / "metal_cpu"
FLAGS = "-fPIC -nostdinc++ -fno-exceptions -fno-rtti -fno-sanitize=all".split()
LIBRARY_FLAGS = ["-O2", "-shared", "-lm"]
# Processors with fused multiply-adds and conversions of half. Not -march=native: newer ones have a conversion to bfloat
# that loses numbers below 1e-38.
PROCESSOR = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() == "x86_64" else []
# Every operation on half and bfloat is rounded, and no product is fused with a sum: what Metal's safe mode promises.
# Variables of a thread that nobody set are NaN. Calls at which threads wait for each other are not doubled: the engine
# tells places in the code apart by them. Metal 3 is C++14 and Metal 4 is C++17: a text must be both, the library need
# not, as it counts as the system's.
METAL_FLAGS = (
    "-std=c++14 -ffp-contract=off -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-ftrivial-auto-var-init=pattern -fconvergent-functions "
    "-Wno-everything -Werror=uninitialized -Werror=vla -Werror=vla-cxx-extension -Werror=return-type "
    "-Werror=c++17-extensions -Werror=c++17-compat -Werror=c++20-extensions -Werror=c++23-extensions"
).split()
METAL_FLAGS += ["-isystem", str(LIBRARY)]


@dataclass(frozen=True)
class Compiled:
    """``body`` is the address of ``void (void** buffers, const Thread&)``; ``buffers`` are their names, in order."""

    body: int
    buffers: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def compiled(text: str) -> Compiled:
    """``text`` is exactly what MLX generated. Compiled once; kept under ``build/metal_cpu`` for the next process."""
    buffers, call = signature(text)
    engine()  # whose functions the kernel calls
    library = ctypes.CDLL(str(build(translated(text) + call, METAL_FLAGS)))
    return Compiled(ctypes.cast(library.metal_cpu_body, ctypes.c_void_p).value or 0, buffers)


def check(text: str) -> None:
    """Raises ``NotMetal`` where ``compiled`` does, in a tenth of its time: nothing is made that could run."""
    with tempfile.TemporaryDirectory() as folder:
        clang(translated(text) + signature(text)[1], [*METAL_FLAGS, "-O0", "-c"], Path(folder, "kernel.o"))


@functools.cache
def engine() -> ctypes.CDLL:
    """The engine that all kernels share: ``metal_cpu_launch``."""
    return ctypes.CDLL(
        str(build(f'#include "{ENGINE / "engine.cpp"}"\n', ["-std=c++17", "-ffp-contract=off"])), ctypes.RTLD_GLOBAL
    )


@functools.cache
def compiler() -> list[str]:
    if chosen := os.environ.get("CXX_METAL_CPU"):
        return shlex.split(chosen)
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise RuntimeError("Metal kernels are compiled by clang: install ziglang, or name one in CXX_METAL_CPU")
    return [str(Path(package.origin).with_name("zig")), "c++"]


@functools.cache
def surroundings() -> bytes:
    """What a compiled file depends on besides its source and flags: the compiler and the headers."""
    files = sorted(path for folder in (LIBRARY, ENGINE) for path in folder.iterdir())
    ran = subprocess.run([*compiler(), "--version"], capture_output=True, env=plain_environment(), check=True)
    return b"\0".join([ran.stdout, *(path.read_bytes() for path in files)])


def plain_environment() -> dict[str, str]:
    """Without a preloaded BLAS, which is of no use to a compiler."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def build(source: str, flags: list[str]) -> Path:
    """The shared library of ``source``. Several may build the same at once: each moves a file of its own into place."""
    flags = [*flags, *LIBRARY_FLAGS]
    key = hashlib.sha256("\0".join([source, *PROCESSOR, *FLAGS, *flags]).encode() + surroundings()).hexdigest()[:24]
    library = BUILD / f"{key}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        made = Path(folder, "kernel.so")
        clang(source, flags, made)
        made.rename(library)
    return library


def clang(source: str, flags: list[str], made: Path) -> None:
    """``source`` to the file ``made``; what else comes about lies beside it."""
    code = made.with_name("kernel.cpp")
    code.write_text(source)
    command = [*compiler(), *flags, *PROCESSOR, *FLAGS, str(code), "-o", str(made)]
    ran = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), cwd=made.parent)
    if ran.returncode:
        raise NotMetal(f"clang refuses the text:\n{ran.stderr[:4000]}")
