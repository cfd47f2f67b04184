"""What a CUDA graph does, on a CPU: every operation of a function is written down and can be done again.

Tensors that the function made are made anew at each replay; all others are read and written where they lie. Whatever
the host computed while recording is frozen, which is the very mistake that this is here to catch. Reading a value
back to the host, impossible within a graph, is an error here too.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} waits for the device, which a graph cannot"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(run):
    """Run ``run`` once; what comes back does it again. It keeps every tensor alive, so that no two have one id.

    A tensor made of the host's numbers would be frozen, and on a GPU copied while capturing: none may be.
    """
    with Recorder() as recorder, contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(mock.patch.object(torch, name, side_effect=AssertionError(f"torch.{name} in a graph")))
        run()

    def replay() -> None:
        made: dict[int, torch.Tensor] = {}

        def now(x):
            return made.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in recorder.calls:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor):
                    made[id(old)] = new

    return replay
