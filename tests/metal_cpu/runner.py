"""Runs Metal kernels on a CPU: MLX generates the text, ``msl_cpu.h`` gives it a meaning, clang (from Zig) compiles it.

A sketch to be replaced.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

HEADER = Path(__file__).with_name("msl_cpu.h")
BUILD = Path(__file__).parents[2] / "build" / "metal_cpu"
COMPILER = [sys.executable, "-m", "ziglang", "c++"]
FLAGS = (
    "-std=c++17 -O2 -march=native -shared -fPIC -nostdinc++ -fno-exceptions -fno-rtti -ffp-contract=off "
    "-fno-sanitize=all "
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-Xclang -cl-single-precision-constant -w -Werror=double-promotion -Werror=vla -Werror=return-type"
).split()
ATTRS = {
    "dispatch_threads_per_threadgroup": "t.dtg", "grid_size": "t.grid", "simdgroup_index_in_threadgroup": "t.sg",
    "simdgroups_per_threadgroup": "t.nsg", "thread_execution_width": "32", "thread_index_in_simdgroup": "t.lane",
    "thread_index_in_threadgroup": "t.lin", "thread_position_in_grid": "t.pos",
    "thread_position_in_threadgroup": "t.ptg", "threadgroup_position_in_grid": "t.tg",
    "threadgroups_per_grid": "(t.grid+t.dtg-1)/t.dtg", "threads_per_grid": "t.grid", "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "t.tgs",
}  # fmt: skip
order = 0


@contextmanager
def thread_order(seed: int):
    """Within, simdgroups and their lanes run in an order shuffled by ``seed``; 0 is ascending."""
    global order
    before, order = order, seed
    try:
        yield
    finally:
        order = before


def traced(kernel, inputs, arguments):
    """MLX's own text, grid, threadgroup of one call."""
    found = []

    def callback(node):
        if node.get("name") == "CustomKernel":
            found.append(node)

    mx.export_function(callback, lambda *xs: kernel.made(inputs=list(xs), **arguments), *inputs)
    return found[0]["arguments"]


_loaded = {}


def build(text):
    name = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.S)
    params = [p.strip() for p in name.group(2).split(",\n")]
    args, buffers = [], []
    for p in params:
        m = re.fullmatch(r"(.*?)([*&]) (\w+) \[\[buffer\(\d+\)\]\]", p)
        if m:
            args.append(f"{'*' if m.group(2) == '&' else ''}({m.group(1)}*)b[{len(buffers)}]")
            buffers.append(m.group(3))
        else:
            args.append(ATTRS[re.search(r"\[\[(\w+)\]\]", p).group(1)])
    inst = re.search(r"decltype\((.*)\) ", text)
    inst = inst.group(1) if inst else name.group(1)
    body = re.sub(r"\ntemplate \[\[host_name.*", "", text, flags=re.S)
    body = re.sub(r"\[\[[^\]]*\]\]", "", body)
    body = re.sub(
        r"\bthreadgroup\s+([\w:<>, ]+?)\s+(\w+)\s*((?:\[[^;\]]*\]\s*)*);",
        r"static threadgroup \1 \2 \3; msl_rt::tg_mem(\2);",
        body,
    )
    cpp = (
        f'#include "{HEADER}"\n#line 1 "kernel.metal"\n{body}\n#undef throw\n'
        'extern "C" int msl_launch(void** u, const size_t* s, int ni, int nb, const uint* g, const uint* t, uint seed, char* e)\n'
        f"{{ return msl_rt::launch(+[](void** b, const msl_rt::Tid& t) {{ {inst}({', '.join(args)}); }}, u, s, ni, nb, g, t, seed, e); }}\n"
    )
    key = hashlib.sha256((cpp + HEADER.read_text() + " ".join(FLAGS)).encode()).hexdigest()[:20]
    if key not in _loaded:
        BUILD.mkdir(parents=True, exist_ok=True)
        lib = BUILD / f"{key}.so"
        if not lib.exists():
            src = BUILD / f"{key}.{os.getpid()}.cpp"
            src.write_text(cpp)
            out = BUILD / f"{key}.{os.getpid()}.so"
            r = subprocess.run([*COMPILER, *FLAGS, str(src), "-o", str(out)], capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
            if r.returncode:
                raise RuntimeError("compile failed\n" + r.stderr[:3000])
            out.rename(lib)
        _loaded[key] = ctypes.CDLL(str(lib)).msl_launch
    return _loaded[key], buffers


def emulate(kernel, inputs, arguments):
    """One call of a kernel, as ``launch.running_on`` wants it."""
    mx.eval(inputs)
    name, text, gx, gy, gz, tx, ty, tz, *_ = traced(kernel, inputs, arguments)
    assert tx * ty * tz <= 1024
    fn, buffers = build(text)
    given = dict(zip(kernel.inputs, inputs, strict=True))
    outs, arrays = [], []
    for b in buffers:
        if b in given:
            a = mx.contiguous(given[b])
            arrays.append(np.ascontiguousarray(np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)))
        elif b in kernel.outputs:
            i = kernel.outputs.index(b)
            shape, dtype = arguments["output_shapes"][i], arguments["output_dtypes"][i]
            o = mx.zeros(shape, dtype)
            o = np.array(o.view(mx.uint16) if dtype == mx.bfloat16 else o)
            o.view(np.uint8).reshape(-1)[:] = 0xFF if dtype != mx.bool_ else 1
            arrays.append(o)
            outs.append((i, o, dtype))
        else:
            which, what = b.rsplit("_", 1)
            a = given[which]
            strides = [int(np.prod(a.shape[i + 1 :])) for i in range(a.ndim)]
            arrays.append(
                {"shape": np.array(a.shape, np.int32), "strides": np.array(strides, np.int64), "ndim": np.array([a.ndim], np.int32)}[what]
            )
    n, error, u3 = len(arrays), ctypes.create_string_buffer(512), ctypes.c_uint * 3
    rc = fn(
        (ctypes.c_void_p * n)(*[a.ctypes.data for a in arrays]), (ctypes.c_size_t * n)(*[a.nbytes for a in arrays]),
        n - len(outs), n, u3(gx, gy, gz), u3(tx, ty, tz), ctypes.c_uint(order), error,
    )  # fmt: skip
    if rc:
        raise RuntimeError(f"{kernel.name}: {error.value.decode()}")
    return [mx.array(o).view(mx.bfloat16) if d == mx.bfloat16 else mx.array(o) for _, o, d in sorted(outs, key=lambda x: x[0])]
