"""The NumPy model: the specification that runs. One row at a time, fp32, every position kept, no shortcuts.

Read ``network.py`` to learn what DiffusionGemma computes, ``model.py`` for what a denoising step is.
"""

from __future__ import annotations

from ..backend import CHOICES, LoadOptions
from ..config import ModelConfig
from ..errors import OptionError
from ..formats import Checkpoint
from ..machine import free_memory
from ..memory import MemoryPlan, rough_plan
from ..tensors import VISION, tensor_table
from .model import ReferenceModel
from .network import Network


def load(checkpoint: Checkpoint, *, device: str = "cpu", dtype: str | None = None) -> ReferenceModel:
    """Read the text weights as float32."""
    assert device == CHOICES["reference"].device
    if dtype not in (None, "float32"):
        raise OptionError(f"dtype={dtype!r}: the reference computes in float32 only")
    names = [name for name, row in checkpoint.table.items() if row.role not in VISION]
    weights = {name: checkpoint.read(name).astype("float32") for name in names}
    return ReferenceModel(checkpoint.config, Network(checkpoint.config.text, weights))


def memory(device: str) -> int:
    return free_memory()


def plan(
    config: ModelConfig, stored: int, checkpoint: Checkpoint | None, *, device: str, options: LoadOptions
) -> MemoryPlan:
    """Of the text model, whose weights are computed in float32 however they are stored."""
    return rough_plan(sum(4 * row.size for row in tensor_table(config).values() if row.role not in VISION))
