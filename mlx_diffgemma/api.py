"""load, generate, stream_generate, batch_generate: the library in four functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from . import hub
from .backend import LoadOptions, Masks, Model, choose, implementation
from .config import GenerationConfig, ModelConfig
from .errors import CheckpointError, OptionError
from .events import Block, Draft, Event, Finished
from .formats import open_checkpoint
from .memory import check_fit
from .prompts.processor import Processor, Prompt
from .sampling import engine
from .sampling.noise import fresh_seed

OPTIONS = {"seed", "stop", "masks", "enable_thinking", "system"} | {
    f.name for f in dataclasses.fields(GenerationConfig)
}


def load(
    model: str | PathLike[str],
    *,
    backend: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    kernels: str = "auto",
    activations: str | None = None,
    head: str | None = None,
    self_conditioning: str = "dense",
    tail: str | None = None,
) -> tuple[Model, Processor]:
    """Load a checkpoint. What is approximate in what was loaded, and what it takes, says ``model.describe()``.

    Args:
        model: a hub name, a folder, a .gguf file with config and tokenizer beside it, or ``demo`` (packaged, 4 MB).
        backend: ``auto``, ``mlx``, ``cuda``, ``cpu`` (torch) or ``reference`` (NumPy).
        dtype: ``bfloat16`` or ``float32``; the checkpoint's own by default.
        revision: branch, tag or commit of a hub repository.
        kernels, activations, head, self_conditioning, tail: see ``LoadOptions``, which also says on which backends.

    Returns:
        The model and its processor, as ``generate`` takes them.

    Raises:
        FileNotFoundError: nothing under that name. UserError: it cannot be read or cannot run here (see ``errors``).
    """
    choice = choose(backend)
    options = LoadOptions(dtype, kernels, activations, head, self_conditioning, tail).checked(choice.name)

    def fits(config: ModelConfig, stored: int) -> None:
        check_fit(choice, config, stored, options=options)

    checkpoint = open_checkpoint(hub.resolve(fspath(model), fits, revision))
    check_fit(choice, checkpoint.config, checkpoint.nbytes, checkpoint, options)
    processor = Processor.from_folder(checkpoint.folder, checkpoint.generation)
    code = implementation(choice)
    return code.load(checkpoint, device=choice.device, dtype=dtype, **options.chosen()), processor


def generate(model: Model, processor: Processor, prompt: Prompt, **options: Any) -> Finished:
    """Answer one prompt: a string, or one list of messages. Options as in ``stream_generate``."""
    return batch_generate(model, processor, [prompt], **options)[0]


def batch_generate(model: Model, processor: Processor, prompts: Sequence[Prompt], **options: Any) -> list[Finished]:
    """Answer several prompts in one batch, in their order. Row r draws from seed + r, as a call of its own would."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise OptionError(f"prompts is {prompts!r:.80}; batch_generate takes a list of prompts, generate takes one")
    if prompts and isinstance(prompts[0], Mapping):
        raise OptionError("prompts is one list of messages; batch_generate takes a list of prompts, generate takes one")
    requests, render = _prepare(model, processor, prompts, options)
    results = [event for event in map(render, engine.run(model, engine.fixed(requests))) if isinstance(event, Finished)]
    return sorted(results, key=lambda result: result.row)


def stream_generate(model: Model, processor: Processor, prompt: Prompt, **options: Any) -> Generator[Event, None, None]:
    """Answer one prompt and report every step: ``Draft``, ``Block`` and ``Finished`` events as they happen.

    Args:
        prompt: a string, or one list of ``{"role": ..., "content": ...}`` messages.
        max_tokens: most visible tokens; whole canvases are denoised and the result is cut.
        seed: 64-bit; ``None`` draws one and reports it in ``stats``.
        stop: a text, or several, that end the answer and are cut off.
        enable_thinking: the template's thinking mode; ``None`` leaves it to the template.
        system: a system message put before the prompt.
        masks: ``Masks`` per block, what the canvases are given.
        max_denoising_steps, t_min, t_max, entropy_bound, stability_threshold, confidence_threshold, temperature:
            see ``GenerationConfig``; the checkpoint's own by default.

    Raises:
        OptionError: an unknown option, a value out of range, a prompt beyond the context. Raised by the call, not by
            the first event. Closing the iterator cancels within one step.
    """
    requests, render = _prepare(model, processor, [prompt], options)
    return (render(event) for event in engine.run(model, engine.fixed(requests)))


def _prepare(
    model: Model, processor: Processor, prompts: Sequence[Prompt], options: dict[str, Any]
) -> tuple[list[engine.Request], Callable[[Event], Event]]:
    """The requests of a call, and the function that puts text into their events."""
    options = dict(options)
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(OPTIONS))}")
    seed = _seed(options.pop("seed", None))
    stop = _stops(options.pop("stop", None))
    masks = _masks(options.pop("masks", None))
    thinking, system = options.pop("enable_thinking", None), options.pop("system", None)
    settings = processor.generation.replace(**options)
    for mask in masks:
        mask.checked(model.config.canvas_length, model.config.text.vocab_size)
    requests = []
    for row, prompt in enumerate(prompts):
        ids = processor.prompt_ids(prompt, enable_thinking=thinking, system=system)
        if max(ids, default=0) >= model.config.text.vocab_size:
            raise CheckpointError(
                f"the tokenizer gave id {max(ids)}, the model has {model.config.text.vocab_size:,} of them; "
                "are they of one model?"
            )
        check_context(model.config, len(ids), settings)
        ended = (lambda tokens: _cut(processor.parse(tokens).text, stop)[1]) if stop else None
        requests.append(engine.Request(row, ids, settings, (seed + row) % 2**64, masks, ended))
    return requests, Renderer(processor, settings, stop).render


def _seed(seed: Any) -> int:
    if seed is None:
        return fresh_seed()
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise OptionError(f"seed={seed!r} must be a whole number from 0 to 2^64 - 1")
    return seed


def _stops(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"stop={stop!r} must be a text or a list of texts, none empty")
    return tuple(texts)


def _masks(masks: Any) -> tuple[Masks, ...]:
    rows = () if masks is None else masks
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Masks) for row in rows):
        raise OptionError(f"masks={masks!r:.80} must be a list of Masks, one per block")
    return tuple(rows)


def check_context(config: ModelConfig, prompt: int, settings: GenerationConfig) -> None:
    """Raise ``OptionError`` when prompt and answer together exceed the context."""
    context, canvas = config.text.max_position_embeddings, config.canvas_length
    needed = prompt + -(-settings.max_tokens // canvas) * canvas
    if needed > context:
        raise OptionError(
            f"the prompt has {prompt:,} tokens and max_tokens={settings.max_tokens:,} needs {needed - prompt:,} more; "
            f"the context holds {context:,}: shorten the prompt or lower max_tokens"
        )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """``text`` before the first of ``stops``, and whether there was one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Renderer:
    """Adds text to events. Keeps, per row, the visible ids and how much of the answer has been given out.

    What a block adds is held back as far as the next block might change it: a tail that could begin a stop text, or a
    character whose bytes are not all there. The end of the answer follows in ``Finished.text``.
    """

    def __init__(self, processor: Processor, settings: GenerationConfig, stop: Sequence[str]):
        self.processor, self.settings, self.stop = processor, settings, stop
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.told: dict[int, int] = {}

    def render(self, event: Event) -> Event:
        before = self.tokens.get(event.row, ())
        if isinstance(event, Draft):
            return dataclasses.replace(event, text=self.answer(before + self.visible(event.argmax.tolist())))
        if isinstance(event, Block):
            self.tokens[event.row] = before + event.tokens
            text, told = self.answer(self.tokens[event.row]), self.told.get(event.row, 0)
            safe = max(told, len(text) - held_back(text, self.stop))
            self.told[event.row] = safe
            return dataclasses.replace(event, text=text[told:safe])
        parsed = self.processor.parse(event.tokens)
        return dataclasses.replace(event, text=_cut(parsed.text, self.stop)[0], thinking=parsed.thinking)

    def visible(self, canvas: list[int]) -> tuple[int, ...]:
        end = next((i for i, id in enumerate(canvas) if id in self.settings.eos_token_ids), len(canvas))
        return tuple(canvas[:end])

    def answer(self, ids: tuple[int, ...]) -> str:
        return _cut(self.processor.parse(ids).text, self.stop)[0]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``text`` that more text could still take away."""
    longest = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for stop in stops:
        starts = (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size]))
        longest = max(longest, next(starts, 0))
    return longest
