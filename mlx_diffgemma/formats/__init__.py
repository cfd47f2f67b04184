"""Checkpoints on disk: which format they are in, and their tensors under canonical names, read when asked for."""

from .checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
