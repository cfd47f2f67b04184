"""The Hugging Face layout: names are canonical already; tied tensors may appear under their other name too."""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from ..tensors import Tensor
from .safetensors import SafetensorsFile


def canonical_names(files: list[SafetensorsFile], table: dict[str, Tensor]) -> dict[str, tuple[SafetensorsFile, str]]:
    """Canonical name -> (file, stored name). An encoder-named text weight stands in for an absent decoder one.

    Raises:
        CheckpointError: a tensor stored twice, or a tied pair with different values.
    """
    found: dict[str, tuple[SafetensorsFile, str]] = {}
    for file in files:
        for name in file.entries:
            if name in found:
                raise CheckpointError(f"{name} is stored twice, in {found[name][0].path.name} and {file.path.name}")
            found[name] = (file, name)
    for row in table.values():
        for tie in row.ties:
            if tie not in found:
                continue
            twin = found.pop(tie)
            kept = found.setdefault(row.name, twin)
            if kept is not twin and not np.array_equal(kept[0].read(kept[1]), twin[0].read(twin[1])):
                raise CheckpointError(f"{twin[0].path}: {tie} differs from {kept[1]}, yet the model shares them")
    return found
