"""What is measured of this library's model: a step, its prefill, and the fixed protocol through the public engine."""

from __future__ import annotations

import dataclasses
import statistics
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cuda_backend import build, fp8_table
from cuda_backend.graphs import GraphState
from cuda_backend.kernels import check
from cuda_backend.kernels.choice import Choice, choose_kernels, gpu_of
from cuda_backend.model import TorchModel
from cuda_backend.step import State
from cuda_backend.weights import Weights
from mlx_diffgemma.backend import CanvasSpec
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.sampling import engine

from .gpu_clock import Clock, milliseconds, wall
from .gpu_parts import current, parts_ms

FATAL = (
    "CUDA error",
    "illegal memory access",
    "unspecified launch failure",
    "misaligned address",
    "device-side assert",
)
FIRST_ID, HIGHEST = 16, 250_000  # special tokens lie below and above
PROTOCOL_PROMPT, PROTOCOL_TOKENS, PROTOCOL_STEPS = 1024, 1024, 16


def settings(steps: int, tokens: int) -> GenerationConfig:
    """The published sampler, but every block takes ``steps`` steps and nothing ends an answer early."""
    return GenerationConfig(
        max_tokens=tokens, max_denoising_steps=steps, stability_threshold=None, confidence_threshold=None
    )


def prompt(config: ModelConfig, tokens: int, row: int = 0) -> tuple[int, ...]:
    """Ids spread over the vocabulary, others in every row."""
    ordinary = min(config.text.vocab_size, HIGHEST) - FIRST_ID
    return tuple(FIRST_ID + (251 * i + 17 * row) % ordinary for i in range(tokens))


def model_of(
    config: ModelConfig,
    weights: Weights,
    device: torch.device,
    head: str,
    *,
    kernels: str = "fused",
    graphs: bool = True,
) -> TorchModel:
    """The model that ``load`` would make of these weights; without ``graphs`` the host starts every operation.

    A kernel that fails the check of ``load`` is left out and named in ``describe()``, where ``load`` would refuse.
    """
    choice = choose_kernels(gpu_of(device, kernels), kernels, weights.embed_tokens.dtype, weights)
    if not graphs:
        choice = without(choice, "graph", "not asked for")
    table = fp8_table(weights.embed_tokens) if head == "fp8" else None
    while True:
        try:
            return build(config, weights, choice, table, {"kernels": choice.describe()})
        except Exception as error:
            kernel = blamed(error) or ("graph" if choice.on("graph") else None)
            if kernel is None or not choice.on(kernel) or is_fatal(error):
                raise
            choice = without(choice, kernel, f"failed: {type(error).__name__}: {str(error)[:300]}")


def without(choice: Choice, kernel: str, reason: str) -> Choice:
    return dataclasses.replace(choice, reasons={**choice.reasons, kernel: reason})


def blamed(error: BaseException) -> str | None:
    """The kernel that was being compared when ``error`` was raised, by the check's own frame."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == check.__file__ and "kernel" in frame.f_locals:
            found = frame.f_locals["kernel"]
    return found


def is_fatal(error: BaseException) -> bool:
    """Whether CUDA is unusable in this process from now on."""
    return any(word in str(error) for word in FATAL) and "out of memory" not in str(error)


@dataclass
class Started:
    """A batch in the middle of a block: a prompt was read and one step taken."""

    state: State | GraphState
    prefill_seconds: float


def start(clock: Clock, model: TorchModel, batch: int, tokens: int, steps: int = 48) -> Started:
    ids = np.array([prompt(model.config, tokens, row) for row in range(batch)])
    cache = None

    def read() -> None:
        nonlocal cache
        cache = model.encode(ids)

    model.encode(ids)  # kernels are compiled outside of the measurement
    seconds = wall(clock, read)
    specs = [CanvasSpec(settings(steps, model.config.canvas_length), seed=row) for row in range(batch)]
    return Started(model.step(model.begin(cache, specs)), seconds)


def step_ms(clock: Clock, model: TorchModel, started: Started, seconds: float = 0.6) -> float:
    """Milliseconds of a step, the soft embedding of the one before it included."""
    state = started.state

    def advance() -> None:
        nonlocal state
        state = model.step(state)

    return milliseconds(clock, advance, seconds)


@torch.inference_mode()
def step_parts(clock: Clock, model: TorchModel, started: Started, seconds: float = 0.2) -> dict[str, float]:
    return parts_ms(clock, model, current(started.state), seconds)


def routing(model: TorchModel, tokens: int) -> dict[str, float]:
    """How evenly a canvas is spread over the experts: their share that is visited, and rows of the fullest one."""
    ids = np.array([prompt(model.config, tokens)])
    canvas = np.random.default_rng(0).integers(0, model.config.text.vocab_size, (1, model.config.canvas_length))
    chosen = model.inspect(model.encode(ids), canvas, want=("router",))["router"]  # [1, layers, C, k]
    experts = model.config.text.num_experts
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen[0]])
    return {"visited": float((counts > 0).mean()), "mean_rows": float(counts.mean()), "most_rows": int(counts.max())}


@dataclass
class Counted:
    """A model that counts what the engine asks of it."""

    model: TorchModel
    calls: dict[str, int] = field(default_factory=lambda: {"encode": 0, "begin": 0, "step": 0})

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        if name not in self.calls:
            return found

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return found(*args, **kwargs)

        return counting


def protocol(
    clock: Clock,
    model: TorchModel,
    batch: int,
    *,
    rounds: int = 3,
    prompt_tokens: int = PROTOCOL_PROMPT,
    tokens: int = PROTOCOL_TOKENS,
) -> dict[str, Any]:
    """The fixed protocol: a prompt, then ``tokens`` in blocks of 16 steps each, stopping off; wall time of all.

    A block's canvas is committed by the first step of the next, so there is one ``encode``, the prompt's, and the model
    runs as often as there are steps. The first round, in which graphs are captured, is told apart.
    """
    blocks = -(-tokens // model.config.canvas_length)
    requests = [
        engine.Request(row, prompt(model.config, prompt_tokens, row), settings(PROTOCOL_STEPS, tokens), seed=row)
        for row in range(batch)
    ]
    seconds = []
    for _ in range(rounds + 1):
        counted = Counted(model)
        seconds.append(wall(clock, lambda counted=counted: list(engine.run(counted, engine.fixed(requests)))))
        expected = {"encode": 1, "begin": blocks, "step": blocks * PROTOCOL_STEPS}
        if counted.calls != expected:
            raise AssertionError(f"the protocol takes {expected}, the engine asked for {counted.calls}")
    middle = statistics.median(seconds[1:])
    return {
        "tok_s": batch * tokens / middle,
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "forwards": blocks * PROTOCOL_STEPS,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
    }
