"""What a checkpoint takes in MLX: quantized weights stay packed; without a GPU, dense experts become float32.

The cache is that of ``TOKENS`` tokens, prompt and answer together; what comes and goes in a step is a bound (see
``tools.plan_memory``). Before the files are here only their size is known, and what they unpack to is estimated.
"""

from __future__ import annotations

from ..backend import LoadOptions
from ..config import ModelConfig
from ..formats import Checkpoint
from ..formats.encoding import Encoding, dense
from ..memory import MemoryPlan, is_packed, width_of
from ..tensors import item_bytes
from ..tools import plan_memory
from ..tools.plan import packed
from ..tools.work import Load
from .kernels.choice import check
from .kernels.elementary import on_cpu

TOKENS = 4096  # of one row, for which a model is planned when it is loaded


def plan(
    config: ModelConfig, stored: int, checkpoint: Checkpoint | None, *, device: str, options: LoadOptions
) -> MemoryPlan:
    """See ``mlx_diffgemma.backend.Backend``. The vision tower is left out where it is known how large it is.

    Raises:
        OptionError: kernels without a GPU, before anything is downloaded.
    """
    check(options.kernels)
    width = width_of(config, options.dtype or (checkpoint.dtype if checkpoint else None))
    load = Load(config, held(checkpoint) if checkpoint else {}, width=width)
    # "auto" may turn out to be plain operations, which take more.
    whole = plan_memory.memory_plan(load, options.kernels == "fused", min(TOKENS, config.text.max_position_embeddings))
    if checkpoint is not None:
        return whole
    wide = 4 if on_cpu() else width  # experts are nearly all of a dense checkpoint
    weights = stored if is_packed(config, stored) else stored // item_bytes(config) * wide
    parts = {name: size for name, size in whole.parts.items() if name != "embedding"} | {"weights": weights}
    return MemoryPlan(parts, whole.tokens, whole.batch)


def held(checkpoint: Checkpoint) -> dict[str, Encoding]:
    """How matrices are kept. Those in FP8 blocks, and GGUF's K-quants, have no product and are unpacked."""
    found = packed({name: stored.encoding for name, stored in checkpoint.tensors.items()})
    if on_cpu():
        experts = (row.name for row in checkpoint.table.values() if row.role == "experts")
        found |= {name: dense("float32") for name in experts if name not in found}
    return found
