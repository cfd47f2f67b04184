"""DiffusionGemma on Macs and NVIDIA GPUs: one sampler, two implementations, judged by the official one."""

from .api import batch_generate, generate, load, stream_generate
from .backend import Masks
from .config import GenerationConfig, ModelConfig
from .errors import UserError
from .events import Block, Draft, Finished, Stats

__version__ = "0.1.0"
__all__ = [
    "Block",
    "Draft",
    "Finished",
    "GenerationConfig",
    "Masks",
    "ModelConfig",
    "Stats",
    "UserError",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]
