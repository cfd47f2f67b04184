"""From the text of a Metal function to a function of this machine: C++ by four small changes, then clang.

clang comes with the package ziglang; ``CXX_METAL_CPU`` names another one (17 or newer), for example ``clang++-19``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY, ENGINE = HERE / "msl", HERE / "engine"
BUILD = HERE.parents[1] / "build" / "metal_cpu"
FLAGS = "-std=c++17 -O2 -shared -fPIC -nostdinc++ -fno-exceptions -fno-rtti -fno-sanitize=all -lm".split()
# Processors with fused multiply-adds and conversions of half. Not -march=native: newer ones have a conversion to bfloat
# that loses numbers below 1e-38.
PROCESSOR = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() == "x86_64" else []
# Every operation on half and bfloat is rounded, and no product is fused with a sum: what Metal's safe mode promises.
# Variables of a thread that nobody set are NaN. Calls at which threads wait for each other are not doubled: the engine
# tells places in the code apart by them.
METAL_FLAGS = (
    "-ffp-contract=off -Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-ftrivial-auto-var-init=pattern -fconvergent-functions "
    "-Wno-everything -Werror=uninitialized -Werror=vla -Werror=vla-cxx-extension -Werror=return-type"
).split()
MOST = "t.most_threads.x * t.most_threads.y * t.most_threads.z"  # threads of a threadgroup that is not cut off
# what MLX passes a kernel on when its source names it, and where the engine has it
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", f"({MOST} + 3) / 4"),
    "dispatch_simdgroups_per_threadgroup": (
        "uint",
        f"({MOST} + 31) / 32",
    ),
    "dispatch_threads_per_threadgroup": ("uint3", "t.most_threads"),
    "grid_origin": ("uint3", "uint3(0)"),
    "grid_size": ("uint3", "t.grid"),
    "quadgroup_index_in_threadgroup": ("uint", "t.index / 4"),
    "quadgroups_per_threadgroup": ("uint", "(t.threads.x * t.threads.y * t.threads.z + 3) / 4"),
    "simdgroup_index_in_threadgroup": ("uint", "t.simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "t.simdgroups"),
    "thread_execution_width": ("uint", "32"),
    "thread_index_in_quadgroup": ("uint", "t.index % 4"),
    "thread_index_in_simdgroup": ("uint", "t.lane"),
    "thread_index_in_threadgroup": ("uint", "t.index"),
    "thread_position_in_grid": ("uint3", "t.in_grid"),
    "thread_position_in_threadgroup": ("uint3", "t.in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "t.group"),
    "threadgroups_per_grid": ("uint3", "t.threadgroups"),
    "threads_per_grid": ("uint3", "t.grid"),
    "threads_per_simdgroup": ("uint", "32"),
    "threads_per_threadgroup": ("uint3", "t.threads"),
}


class NotMetal(RuntimeError):
    """The text is not Metal, or none that the runner knows."""


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
    strict = re.search(r"\b(struct|class|union)\b", without_comments(text)) is None
    flags = [*METAL_FLAGS, f"-I{LIBRARY}", *(["-DMETAL_CPU_ADDRESS_SPACES"] if strict else [])]
    library = ctypes.CDLL(str(build(translated(text) + call, flags)))
    return Compiled(ctypes.cast(library.metal_cpu_body, ctypes.c_void_p).value or 0, buffers)


@functools.cache
def engine() -> ctypes.CDLL:
    """The engine that all kernels share: ``metal_cpu_launch``."""
    return ctypes.CDLL(str(build(f'#include "{ENGINE / "engine.cpp"}"\n', ["-ffp-contract=off"])), ctypes.RTLD_GLOBAL)


def signature(text: str) -> tuple[tuple[str, ...], str]:
    """The names of the kernel's buffers, and C++ that calls it with what lies behind ``void**``."""
    found = re.search(r"^\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.S | re.M)
    if not found:
        raise NotMetal(f"no kernel in the text that MLX generated:\n{text}")
    buffers: list[str] = []
    values = []
    for parameter in found[2].split(",\n"):
        if buffer := re.fullmatch(r"\s*(.*?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]", parameter):
            if int(buffer[4]) != len(buffers):
                raise NotMetal(f"buffers out of order: {parameter}")
            values.append(f"{'*' if buffer[2] == '&' else ''}({buffer[1]}*)b[{len(buffers)}]")
            buffers.append(buffer[3])
        elif attribute := re.fullmatch(r"\s*(\w+) (\w+) \[\[(\w+)\]\]", parameter):
            known = ATTRIBUTES.get(attribute[3])
            if known is None or known[0] != attribute[1]:
                raise NotMetal(f"unknown attribute: {parameter}")
            values.append(known[1])
        else:
            raise NotMetal(f"unknown argument: {parameter}")
    instance = re.search(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*)\) ", text, re.M)
    call = f"{instance[1] if instance else found[1]}({', '.join(values)});"
    return tuple(buffers), f'extern "C" void metal_cpu_body(void** b, const metal_cpu::Thread& t) {{ {call} }}\n'


def translated(text: str) -> str:
    """As C++. Lines stay where they are, so that the compiler's and the engine's messages name those of ``text``."""
    text = without_comments(text)
    # the instance is made by the call instead: clang takes no attributes at this place
    text = re.sub(r"^template \[\[host_name.*", "", text, flags=re.M)
    # a literal without a suffix is a float in Metal
    number = r"(?<![\w.])((?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)"
    if long := re.search(number + r"[lL]\b", text):
        raise NotMetal(f"Metal has no double, nor anything longer: {long[0]}")
    text = re.sub(number + r"(?![\w.])", r"\1f", text)
    return f'#include <metal_stdlib>\n#line 1 "kernel.metal"\n{shared_variables(text)}\n'


def shared_variables(text: str) -> str:
    """Variables of a threadgroup become references to memory that the engine guards.

    One per declaration: ``threadgroup T name[N][M];``. Any other way to declare them is refused, as it would silently
    give each thread a variable of its own.
    """
    count = 0

    def replace(found: re.Match[str]) -> str:
        nonlocal count
        kind, name, sizes = found.groups()
        count += 1
        return (
            f"typedef threadgroup {kind} {name}_type{sizes}; static void* {name}_memory; static ulong {name}_number; "
            f"{name}_type& {name} = metal_cpu::threadgroup_variable<{name}_type>"
            f"({count - 1}, {name}_memory, {name}_number);"
        )

    declaration = r"(?<![\w*&(,]) ?\bthreadgroup\s+([\w:]+(?:<[\w:<>, ]*>)?)\s+(\w+)\s*((?:\[[^;\]]*\]\s*)*);"
    rest = re.sub(declaration, "", text)
    if stray := re.search(r"\bthreadgroup\b(?![^;,(){}=]*[*&])[^;{}]*", rest):
        raise NotMetal(f"a threadgroup variable stands alone, without initial value: {stray[0]!r}")
    return re.sub(declaration, replace, text)


def without_comments(text: str) -> str:
    """Comments replaced by as many lines."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda found: "\n" * found[0].count("\n") or " ", text, flags=re.S)


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
    key = hashlib.sha256("\0".join([source, *PROCESSOR, *FLAGS, *flags]).encode() + surroundings()).hexdigest()[:24]
    library = BUILD / f"{key}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        code, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        code.write_text(source)
        command = [*compiler(), *flags, *PROCESSOR, *FLAGS, str(code), "-o", str(made)]
        ran = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), cwd=folder)
        if ran.returncode:
            raise NotMetal(f"clang refuses the text:\n{ran.stderr[:4000]}")
        made.rename(library)
    return library
