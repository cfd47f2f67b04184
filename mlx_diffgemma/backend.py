"""The seam between the core and its implementations: what a model does, what it is told, what it shows.

A model performs one denoising step. Logits never cross this line, for one step makes 256 x 262,144 of them; what
crosses is a ``CanvasView`` of a few kilobytes. This file is the only place where a backend is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .config import UNSET, GenerationConfig, ModelConfig
from .errors import BackendError, OptionError

if TYPE_CHECKING:
    from .formats import Checkpoint
    from .memory import MemoryPlan

Array = np.ndarray
TEXT_ONLY = "text only: the vision tower is not loaded"  # a note for ``describe()``
KERNELS = ("auto", "ops", "fused")
# option of ``load`` -> its values, the default first, and the backends that know others
OFFERED: dict[str, tuple[tuple[str | None, ...], tuple[str, ...]]] = {
    "kernels": (KERNELS, ("mlx", "cuda", "cpu")),
    "activations": ((None, "fp8"), ("cuda", "cpu")),
    "head": ((None, "fp8"), ("cuda", "cpu")),
    "self_conditioning": (("dense", "survivors"), ("mlx",)),
    "tail": ((None, "hold"), ("mlx",)),
}


@dataclass(frozen=True)
class Remarks:
    """What ``Model.describe`` says of the weights. ``formats`` counts the tensors in each."""

    formats: dict[str, int]
    approximations: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Masks:
    """Which canvas positions are given: int32 [C] token ids, ``UNSET`` (-1) where free; ``None`` is all free.

    Args:
        init: replaces the random start token.
        clamp: held for the whole block: the model reads it, the result shows it, no rule counts it.
        renoise_from: what a rejected position returns to, instead of a fresh random token.
        banned: ids that cannot appear before position ``banned_until``.
    """

    init: Array | None = None
    clamp: Array | None = None
    renoise_from: Array | None = None
    banned: tuple[int, ...] = ()
    banned_until: int = 0

    def checked(self, canvas_length: int, vocab_size: int) -> Masks:
        """Itself, when every array has the canvas's shape and every id is in the vocabulary.

        Raises:
            OptionError: the first thing that does not fit.
        """
        for name in ("init", "clamp", "renoise_from"):
            mask = getattr(self, name)
            if mask is None:
                continue
            if np.shape(mask) != (canvas_length,):
                raise OptionError(f"{name} has shape {np.shape(mask)}, a canvas here has ({canvas_length},) positions")
            if np.asarray(mask).dtype.kind not in "iu":
                raise OptionError(f"{name} holds {np.asarray(mask).dtype} values, expected token ids")
            if np.min(mask) < UNSET or np.max(mask) >= vocab_size:
                raise OptionError(f"{name} holds {np.min(mask)}..{np.max(mask)}, ids run from -1 to {vocab_size - 1}")
        outside = [id for id in self.banned if not isinstance(id, int | np.integer) or not 0 <= id < vocab_size]
        if outside:
            raise OptionError(f"banned holds {outside[0]!r}, ids run from 0 to {vocab_size - 1}")
        if len(set(self.banned)) == vocab_size:
            raise OptionError("banned holds every id; leave at least one")
        if not 0 <= self.banned_until <= canvas_length:
            raise OptionError(f"banned_until={self.banned_until} must be from 0 to {canvas_length}")
        return self


def given(mask: Array | None, otherwise: Array) -> Array:
    """The mask's ids where it has any, ``otherwise`` elsewhere."""
    return otherwise if mask is None else np.where(np.asarray(mask) == UNSET, otherwise, mask).astype(otherwise.dtype)


@dataclass(frozen=True)
class CanvasSpec:
    """One row of one block: how it is sampled, from which noise, and what is given.

    ``seed`` is 64 bits; ``block`` and ``attempt`` (a new try at the same block) only choose the noise.
    """

    settings: GenerationConfig
    seed: int
    block: int = 0
    attempt: int = 0
    masks: Masks = Masks()

    def decided(self, canvas_length: int) -> bool:
        """True when every position is clamped, so that no step is needed."""
        clamp = self.masks.clamp
        return clamp is not None and bool((np.asarray(clamp)[:canvas_length] != UNSET).all())


@dataclass(frozen=True)
class CanvasView:
    """What one step shows, per row. Arrays are [B, C] but ``done`` and ``steps``, which are [B].

    Args:
        canvas: int32 ids that the next step reads: accepted draws, fresh noise elsewhere.
        argmax: int32 ids of the draft; of a finished row, its result.
        accepted: bool, drawn tokens kept by the entropy bound.
        entropy: float32 nats, of the temperature-shaped distribution.
        confidence: float32 probability of the argmax.
        done: bool, the row has stopped. steps: int32, steps it took.
    """

    canvas: Array
    argmax: Array
    accepted: Array
    entropy: Array
    confidence: Array
    done: Array
    steps: Array


class Cache(Protocol):
    """Keys and values of what has been read so far: ragged, each row starts at position 0 of its own slots."""

    @property
    def lengths(self) -> Array: ...  # int64 [B], tokens held per row

    @property
    def nbytes(self) -> int: ...

    scores: Array | None  # float32 [B, L]: log p of the last encode(score=True), nan in column 0 and padding

    def select(self, rows: Sequence[int]) -> Cache:
        """A cache of these rows, in this order."""
        ...

    def concat(self, other: Cache) -> Cache:
        """A cache with the rows of both."""
        ...


class Model(Protocol):
    """What ``load`` returns. ``State`` is the backend's own record of one block in progress."""

    config: ModelConfig

    def describe(self) -> dict[str, Any]:
        """Backend, device, dtype, kernels, weight bytes, notes, and every approximation in force."""
        ...

    def peak_memory(self) -> int:
        """Most bytes in use so far, as the backend counts them."""
        ...

    def encode(self, tokens: Array, cache: Any = None, *, lengths: Array | None = None, score: bool = False) -> Any:
        """Read ``tokens`` [B, L] causally; the cache is extended in place and returned, a new one if none is given.

        ``lengths`` [B]: how many tokens of each row count, 0 leaves a row untouched. ``score`` sets ``cache.scores``.
        """
        ...

    def begin(self, cache: Any, specs: Sequence[CanvasSpec], *, commit: tuple[Array, Array] | None = None) -> Any:
        """Start a block, one spec per row; ``commit`` (tokens [B, C], lengths [B]) is read into the cache first.

        A backend may read it in one forward with the block's first step; the result is the same. The state looks into
        the cache: nothing else may be encoded there until the block is over. A state is stepped from once.
        """
        ...

    def step(self, state: Any) -> Any:
        """One denoising step, submitted and not waited for. Finished rows stay as they are.

        What a step may leave out, where that was asked for, is decided by the views read so far.
        """
        ...

    def read(self, state: Any) -> CanvasView:
        """The only wait: what the last step made."""
        ...

    def inspect(
        self, cache: Any, canvas: Array, *, previous: Array | None = None, want: Sequence[str] = ("logits",)
    ) -> Mapping[str, Array]:
        """One forward that explains itself.

        Args:
            canvas: int ids [B, C].
            previous: float32 [B, C, V], the shaped logits of the step before, for the self-conditioning.
            want: of ``logits`` float32 [B, C, V], ``hidden`` float32 [B, C, D] after the last norm, ``router``
                int32 [B, layers, C, k] (the experts chosen, best first), ``router_probabilities`` float32
                [B, layers, C, E].
        """
        ...


class Backend(Protocol):
    """A backend package."""

    def load(self, checkpoint: Checkpoint, *, device: str, dtype: str | None, **options: str) -> Model:
        """Build the model on a device. ``options``: see ``LoadOptions.chosen``."""
        ...

    def memory(self, device: str) -> int:
        """Bytes that a model may use there; 0 where the system does not tell."""
        ...

    def plan(
        self,
        config: ModelConfig,
        stored: int,
        checkpoint: Checkpoint | None,
        *,
        device: str,
        options: LoadOptions,
    ) -> MemoryPlan:
        """What ``stored`` bytes of weights will take. Before they are downloaded there is no ``checkpoint``."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """How a model is computed. The defaults are exact.

    Args:
        dtype: ``bfloat16`` or ``float32``; the checkpoint's own by default.
        kernels: ``ops`` are the framework's plain operations, ``fused`` uses every kernel there is for the device,
            ``auto`` those that were proven on such a device.
        activations: torch: ``fp8`` rounds what is multiplied with FP8 weights to FP8 as well, token by token.
        head: torch: ``fp8`` makes the logits from an FP8 copy of the embedding.
        self_conditioning: MLX: ``survivors`` makes the soft embedding from the tokens that matter, at least e^-10 as
            likely as the likeliest, where they are few.
        tail: MLX: ``hold`` computes no logits for what stands behind the end of the text and no longer changes.
    """

    dtype: str | None = None
    kernels: str = "auto"
    activations: str | None = None
    head: str | None = None
    self_conditioning: str = "dense"
    tail: str | None = None

    def checked(self, backend: str) -> LoadOptions:
        """Itself.

        Raises:
            OptionError: a value that is unknown, or that the backend does not have.
        """
        if self.dtype not in (None, "bfloat16", "float32"):
            raise OptionError(f"dtype={self.dtype!r} must be bfloat16 or float32")
        for name, (values, _) in OFFERED.items():
            if getattr(self, name) not in values:
                named = [value for value in values if value]
                leave = "" if len(named) == len(values) else ", or leave it out"
                raise OptionError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(named)}{leave}")
        for name, value in self.chosen().items():
            if backend not in OFFERED[name][1]:
                raise OptionError(f"{name}={value!r} is not available on backend {backend!r}: leave it out")
        return self

    def chosen(self) -> dict[str, str]:
        """All but ``dtype`` that is not as by default: what only some backends take."""
        every = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self) if f.name != "dtype"}
        return {name: value for name, (value, default) in every.items() if value != default}


@dataclass(frozen=True)
class Choice:
    """A backend by its public name: package, device, what must be installed, and the extra that installs it."""

    name: str
    package: str
    device: str
    needs: str
    extra: str


CHOICES = {
    "mlx": Choice("mlx", "mlx_diffgemma.mlx_backend", "auto", "mlx", "mlx"),
    "cuda": Choice("cuda", "cuda_backend", "cuda", "torch", "cuda"),
    "cpu": Choice("cpu", "cuda_backend", "cpu", "torch", "cuda"),
    "reference": Choice("reference", "mlx_diffgemma.reference", "cpu", "numpy", "test"),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def has_gpu() -> bool:
    """True where torch is installed and sees an NVIDIA GPU."""
    return installed("torch") and bool(importlib.import_module("torch").cuda.is_available())


def choose(name: str = "auto") -> Choice:
    """The backend for ``name``; ``auto`` is MLX on Apple silicon, CUDA with a GPU, else what is installed.

    Raises:
        OptionError: unknown name.
        BackendError: not installed; the message names the extra.
    """
    if name == "auto":
        return _automatic()
    if name not in CHOICES:
        raise OptionError(f"backend={name!r} is unknown; choose auto, {', '.join(CHOICES)}")
    choice = CHOICES[name]
    if not installed(choice.needs):
        raise BackendError(f"backend {name!r} needs {choice.needs}: pip install 'mlx-diffgemma[{choice.extra}]'")
    if name == "cuda" and not has_gpu():
        raise BackendError("backend 'cuda' needs an NVIDIA GPU that torch can see; backend 'cpu' runs without one")
    return choice


def _automatic() -> Choice:
    if sys.platform == "darwin" and installed("mlx"):
        return CHOICES["mlx"]
    if has_gpu():
        return CHOICES["cuda"]
    for name in ("mlx", "cpu"):
        if installed(CHOICES[name].needs):
            return CHOICES[name]
    raise BackendError("no backend is installed: pip install 'mlx-diffgemma[mlx]' or 'mlx-diffgemma[cuda]'")


def implementation(choice: Choice) -> Backend:
    """Import the backend's package."""
    return importlib.import_module(choice.package)
