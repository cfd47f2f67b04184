"""What both models are asked: the prompts of a file, and canvases frozen on their way from noise to an answer.

A canvas that both models read, at a temperature, after a context, is a ``Trial``. Where the file says what the right
answer is, its first canvas is noised as in training, each position replaced by a random token with some probability.
Where it does not, canvases are taken from the source's own denoising.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlx_diffgemma
from mlx_diffgemma.api import check_context
from mlx_diffgemma.backend import Model
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.events import Block, Draft, Finished
from mlx_diffgemma.prompts.processor import Processor, Prompt
from mlx_diffgemma.sampling import engine, rules
from mlx_diffgemma.sampling.noise import INIT, bits, block_noise, token, uniform

from .options import expanded

DEMO_PROMPTS = Path(mlx_diffgemma.__file__).parent / "fixtures" / "demo_prompts.jsonl"
END = "<turn|>"
LEVELS = 4  # canvases of one prompt: noise levels 1/4 to 4/4, or as many steps of a trajectory
LOGITS_AT_ONCE = 1 << 28  # bytes


@dataclass(frozen=True)
class Question:
    """One line of a prompts file. ``where`` names the line in messages."""

    prompt: Prompt
    answer: str | None
    where: str


@dataclass(frozen=True)
class Trial:
    """One fixed state of denoising.

    Args:
        question: index into the prompts.
        context: prompt ids.
        canvas: int32 [C], what the models read.
        temperature: divisor of the logits.
        noise: share of positions that differ from the clean canvas, or from the finished one.
    """

    question: int
    context: tuple[int, ...]
    canvas: np.ndarray
    temperature: float
    noise: float


@dataclass(frozen=True)
class Outcome:
    """A generated answer; ``fed`` [steps, C] are the canvases that the steps of its first block read."""

    text: str
    steps: int
    canvases: int
    fed: np.ndarray
    final: np.ndarray


def read_questions(name: str) -> list[Question]:
    """The prompts of a file: one per line, or a JSON object per line with ``prompt`` and, optionally, ``answer``.

    ``demo`` means the packaged held-out tasks of the demo checkpoint. Empty lines are skipped.

    Raises:
        FileNotFoundError: no such file. OptionError: nothing in it, or a line that is not understood.
    """
    file = DEMO_PROMPTS if name == "demo" else expanded(name)
    if not file.is_file():
        raise FileNotFoundError(f"{name!r} is not a file; give a text file with one prompt per line, or 'demo'")
    try:
        lines = [(i, line.strip()) for i, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1)]
    except UnicodeDecodeError as error:
        raise OptionError(f"{name} is not UTF-8 text ({error.reason})") from error
    lines = [(i, line) for i, line in lines if line]
    if not lines:
        raise OptionError(f"{name} holds no prompt; write one per line")
    parse = _json_line if lines[0][1].startswith("{") else _text_line
    return [parse(line, f"{name}, line {i}") for i, line in lines]


def _text_line(line: str, where: str) -> Question:
    return Question(line, None, where)


def _json_line(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise OptionError(f"{where} is not JSON ({error.msg}); the first line is, so all must be") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
        raise OptionError(f"{where}: expected an object with a prompt, a text or a list of messages")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise OptionError(f"{where}: answer is {answer!r:.80}, expected a text")
    return Question(row["prompt"], answer, where)


def contexts(
    questions: Sequence[Question], processor: Processor, config: ModelConfig, settings: Sequence[GenerationConfig]
) -> list[tuple[int, ...]]:
    """Prompt ids of every question, answered with its own settings.

    Raises:
        OptionError: a prompt that is empty, malformed, beyond the context or not of this vocabulary; names its line.
    """
    found = []
    for question, own in zip(questions, settings, strict=True):
        try:
            ids = processor.prompt_ids(question.prompt)
            check_context(config, len(ids), own)
        except OptionError as error:
            raise OptionError(f"{question.where}: {error}") from error
        if max(ids, default=0) >= config.text.vocab_size:
            raise OptionError(f"{question.where}: the tokenizer gave id {max(ids)}, the model has fewer")
        found.append(ids)
    return found


def noised(
    question: int, context: tuple[int, ...], clean: np.ndarray, vocab: int, settings: GenerationConfig, seed: int
) -> list[Trial]:
    """The clean canvas int32 [C] at every noise level, at the temperature that belongs to it."""
    found = []
    for level in range(1, LEVELS + 1):
        share = level / LEVELS
        words = bits(seed, length=len(clean), steps=2, block=question, attempt=level, purpose=INIT)
        canvas = np.where(uniform(words[0]) < share, token(words[1], vocab), clean).astype(np.int32)
        warmth = (settings.t_min + (settings.t_max - settings.t_min) * share) * (settings.temperature or 1.0)
        found.append(Trial(question, context, canvas, warmth, float((canvas != clean).mean())))
    return found


def clean_canvas(answer: str, processor: Processor, length: int, settings: GenerationConfig) -> np.ndarray:
    """int32 [C]: the first canvas of an answer, its end token and padding."""
    turn, ends = processor.tokenizer.id_of(END), settings.eos_token_ids
    end = [turn] if turn in ends else list(ends[:1])
    canvas = np.full(length, settings.pad_token_id or 0, np.int32)
    ids = [*processor.tokenizer.encode(answer), *end][:length]
    canvas[: len(ids)] = ids
    return canvas


def from_trajectory(
    question: int, context: tuple[int, ...], outcome: Outcome, settings: GenerationConfig
) -> list[Trial]:
    """Up to ``LEVELS`` canvases of an outcome's first block, evenly over its steps from the first to the last."""
    warmth = rules.temperatures(settings)
    steps = sorted({round(at) for at in np.linspace(0, len(outcome.fed) - 1, LEVELS)})
    return [
        Trial(question, context, outcome.fed[s], float(warmth[s]), float((outcome.fed[s] != outcome.final).mean()))
        for s in steps
    ]


def rows_at_once(config: ModelConfig) -> int:
    """Canvases whose logits, in float32, are small enough to be made together."""
    return int(np.clip(LOGITS_AT_ONCE // (4 * config.canvas_length * config.text.vocab_size), 1, 32))


def generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[tuple[int, ...]],
    settings: Sequence[GenerationConfig],
    seed: int,
) -> list[Outcome]:
    """Answer all prompts, each with its settings; row r from seed + r, whatever the batch."""
    found: list[Outcome] = []
    batch = rows_at_once(model.config)
    for start in range(0, len(prompts), batch):
        part = range(start, min(start + batch, len(prompts)))
        requests = [engine.Request(i, prompts[i], settings[i], (seed + i) % 2**64) for i in part]
        found += _answers(model, processor, requests)
    return found


def _answers(model: Model, processor: Processor, requests: Sequence[engine.Request]) -> list[Outcome]:
    """One batch. Draft s shows what step s + 1 read; step 0 read the start noise."""
    length, vocab = model.config.canvas_length, model.config.text.vocab_size
    fed: dict[int, list[np.ndarray]] = {}
    for r in requests:
        noise = block_noise(r.seed, block=0, attempt=0, steps=1, length=length, vocab_size=vocab)
        fed[r.row] = [noise.start]
    final, ended = {}, {}
    for event in engine.run(model, engine.fixed(requests)):
        if isinstance(event, Draft) and event.block == 0:
            fed[event.row].append(event.canvas)
        elif isinstance(event, Block) and event.block == 0:
            final[event.row] = event.canvas
        elif isinstance(event, Finished):
            ended[event.row] = event
    return [
        Outcome(
            processor.parse(ended[r.row].tokens).text,
            ended[r.row].stats.forwards,
            ended[r.row].stats.blocks,
            np.stack(fed[r.row][:-1]),  # the last draft was read by no step
            final[r.row],
        )
        for r in requests
    ]
