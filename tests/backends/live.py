"""Counting the bytes of tensors that are alive at once while something runs."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """``peak``: most bytes of storages made within. What one operation needs inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.peak, self.largest = 0, 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_dense(tensor)}
        out = func(*args, **(kwargs or {}))
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        for tensor in filter(is_dense, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


def is_dense(x: object) -> bool:
    return isinstance(x, torch.Tensor)
