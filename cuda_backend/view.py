"""A step's results as one int32 tensor, so that they cross to the host in one transfer: [B, 5 C + 2]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlx_diffgemma.backend import CanvasView


def pack(
    canvas: Tensor,
    argmax: Tensor,
    accepted: Tensor,
    entropy: Tensor,
    confidence: Tensor,
    done: Tensor,
    steps: Tensor,
) -> Tensor:
    """The fields of ``CanvasView``, 20 bytes per position; floats as their bits."""
    return torch.cat(
        [
            canvas,
            argmax,
            accepted.int(),
            entropy.view(torch.int32),
            confidence.view(torch.int32),
            done.int()[:, None],
            steps[:, None],
        ],
        dim=1,
    )


def unpack(packed: np.ndarray) -> CanvasView:
    length = (packed.shape[1] - 2) // 5
    canvas, argmax, accepted, entropy, confidence = (packed[:, i * length : (i + 1) * length] for i in range(5))
    return CanvasView(
        canvas=canvas.copy(),
        argmax=argmax.copy(),
        accepted=accepted.astype(np.bool_),
        entropy=entropy.copy().view(np.float32),
        confidence=confidence.copy().view(np.float32),
        done=packed[:, -2].astype(np.bool_),
        steps=packed[:, -1].copy(),
    )


class Reader:
    """Device to host through pinned memory, which alone a GPU writes to without a copy in between; the host waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pinned: Tensor | None = None

    def __call__(self, packed: Tensor) -> np.ndarray:
        """A view of the host's buffer: take what is needed before the next call."""
        if self.device.type != "cuda":
            return packed.numpy()
        if self._pinned is None or self._pinned.shape != packed.shape:
            self._pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._pinned.copy_(packed, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return self._pinned.numpy()
