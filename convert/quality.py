"""The measures of a quality report, and the checkpoints between two: NumPy on what models said, never a model.

Divergences are in nats and from the source's side, KL(source || other). A group is what is quantized together and
judged together: one role in one layer, ``(3, "experts")``, or a role outside the layers, ``(None, "embedding")``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.formats.encoding import Encoded, dense
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.tensors import VISION

from .edges import Error
from .recipes import layer_of

Group = tuple[int | None, str]
CHUNK = 1 << 22  # values of a tensor that are in float32 at once


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log p of the last axis; the sum of p is 1 to the last bit that matters, so that no KL is negative."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def divergence(source: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(source) || softmax(other)) in nats, [..., V] -> float64 [...]."""
    left, right = log_softmax(source), log_softmax(other)
    p = np.exp(left)
    return np.maximum((p * np.where(p > 0, left - right, 0)).sum(-1), 0)


def overlap(source: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of the experts in ``source`` [..., k] that are in ``other`` [..., k] too, whatever their order: [...]."""
    return (source[..., :, None] == other[..., None, :]).any(-1).mean(-1)


def spread(values: np.ndarray, clusters: Sequence[int]) -> dict[str, float | int | None]:
    """Of values [N, ...]: mean with half its 95 % interval, percentiles, maximum, count.

    ``clusters`` [N] says which prompt each row is of: rows of one prompt are alike, so the standard error is that of
    their sums (linearised cluster variance), and unknown where there is one prompt. With few large values, as
    divergences have, it is itself uncertain.
    """
    mean, names = float(values.mean()), sorted(set(clusters))
    rows = (values - mean).reshape(len(values), -1).sum(-1)
    sums = np.array([rows[np.asarray(clusters) == name].sum() for name in names])
    half = None
    if len(names) > 1:
        half = 1.96 * math.sqrt(float((sums**2).sum()) * len(names) / (len(names) - 1)) / values.size
    p50, p95, p99 = (float(p) for p in np.percentile(values, (50, 95, 99)))
    return {
        "mean": mean,
        "mean_half_interval": half,
        "median": p50,
        "p95": p95,
        "p99": p99,
        "max": float(values.max()),
        "count": int(values.size),
    }


def paired(left: Sequence[bool], right: Sequence[bool]) -> dict[str, float | int | list[float]]:
    """Two runs on the same prompts: the difference of their rates and its 95 % interval.

    Wald's interval for McNemar's table with half an answer more in each of its four cells (Agresti and Min, 2005):
    without them, a few prompts answered alike would seem to prove that nothing was lost.
    """
    count = len(left)
    lost = sum(a and not b for a, b in zip(left, right, strict=True))
    won = sum(b and not a for a, b in zip(left, right, strict=True))
    middle = (won - lost) / (count + 2)
    half = 1.96 * math.sqrt(won + lost + 1 - (won - lost) * middle) / (count + 2)
    return {
        "only_source": lost,
        "only_quantized": won,
        "difference": (won - lost) / count,
        "interval": [middle - half, middle + half],
    }


def tensor_error(source: Stored, other: Stored) -> Error:
    """||W - Wq|| by ||W|| once both are decoded; they are read in step, ``CHUNK`` values at a time."""
    align = math.lcm(*(max(1, stored.encoding.block if len(stored.shape) == 2 else 1) for stored in (source, other)))
    total = Error()
    for start, stop in source.chunks(CHUNK, align):
        expected = source.read(start, stop).decode().astype(np.float32, copy=False)
        found = other.read(start, stop).decode().astype(np.float32, copy=False)
        total += Error(_squares(expected - found), _squares(expected))
    return total


def _squares(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def summed(errors: Iterable[Error]) -> Error:
    return sum(errors, Error())


def groups(checkpoint: Checkpoint, names: Iterable[str]) -> dict[Group, list[str]]:
    """``names`` by group, in the order of the tensor table; what no backend runs is left out."""
    chosen = set(names)
    found: dict[Group, list[str]] = {}
    for name, row in checkpoint.table.items():
        if name in chosen and row.role not in VISION:
            found.setdefault((layer_of(row), row.role), []).append(name)
    return found


def hybrid(source: Checkpoint, other: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """``source`` with the tensors ``names`` of ``other``; nothing is read."""
    return dataclasses.replace(source, tensors=source.tensors | {name: other.tensors[name] for name in names})


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same values, every quantized tensor as dense float32: what exact kernels would compute with.

    They still count as quantized, so that the memory they take is reckoned from their shapes, not from the files.
    """
    tensors = {
        name: _dense(stored) if stored.encoding.quantized else stored for name, stored in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _dense(stored: Stored) -> Stored:
    encoding = dense("float32")

    def load(start: int, stop: int) -> Encoded:
        values = stored.read(start, stop).decode()
        return Encoded(encoding, values.shape, {"weight": values})

    return dataclasses.replace(stored, encoding=encoding, load=load, label=f"{stored.format}, read as float32")
