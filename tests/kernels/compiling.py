"""Compile what one kernel file would launch on the 26B model, for one card, on a machine that has none.

    TRITON_INTERPRET=0 python -m tests.kernels.compiling norm 90

``norm_launches.py`` beside this file calls the kernels of ``norm.py`` on meta tensors of the real shapes; the launches
are recorded, compiled to machine code by Triton's own ptxas, and listed as JSON lines with the shared memory they take.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.launch import Launch, recording

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.uint32: "*u32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def source(launch: Launch) -> ASTSource:
    """The kernel specialized as the launcher of Triton would: divisible by 16, or equal to 1, or neither."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(names):
        value = launch.constants[name] if name in launch.constants else launch.args[at]
        if name in launch.constants or value is None or (value == 1 if isinstance(value, int) else False):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch: Launch, sm: int) -> dict:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    made = triton.compile(source(launch), target=GPUTarget("cuda", sm, 32), options=options)
    constants = {name: str(value) for name, value in launch.constants.items()}
    types = [str(arg.dtype).removeprefix("torch.") for arg in launch.args if isinstance(arg, torch.Tensor)]
    return {
        "kernel": launch.kernel.__name__,
        "sm": sm,
        "types": types,
        "constants": constants,
        "shared": made.metadata.shared,
        "cubin": len(made.asm["cubin"]),
        "tensor_cores": "wgmma"
        if "wgmma" in made.asm["ptx"]
        else "mma"
        if "mma.sync" in made.asm["ptx"]
        else "tcgen05"
        if "tcgen05" in made.asm["ptx"]
        else "",
    }


def launches(name: str, sm: int) -> list[Launch]:
    """Each distinct one, as they are compiled."""
    with recording() as recorded:
        importlib.import_module(f"tests.kernels.{name}_launches").launches(CARDS[sm])
    distinct = {}
    for launch in recorded:
        distinct[source(launch).hash() + str((launch.num_warps, launch.num_stages))] = launch
    return list(distinct.values())


if __name__ == "__main__":
    for found in launches(sys.argv[1], int(sys.argv[2])):
        print(json.dumps(compiled(found, int(sys.argv[2]))), flush=True)
