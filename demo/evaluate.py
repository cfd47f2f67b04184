"""How good the demo is: exact answers on held-out prompts, steps per canvas, and divergence on fixed noisy canvases.

    python demo/evaluate.py --count 2000 --backend cpu --out demo/results.json

The end-to-end measure of this project: every kernel, format and sampler is judged on the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tasks import NAMES_OF_TASKS, Example, draw, evaluation_set
from vocabulary import END_OF_TURN, PAD, chat, encode

from convert import quality
from mlx_diffgemma import Finished, load
from mlx_diffgemma.backend import Model
from mlx_diffgemma.prompts.processor import Processor
from mlx_diffgemma.sampling import engine
from mlx_diffgemma.sampling.noise import bits, token, uniform


@dataclass(frozen=True)
class Answer:
    example: Example
    text: str
    steps: int
    canvases: int

    @property
    def right(self) -> bool:
        return self.text == self.example.answer


def answers(model: Model, processor: Processor, examples: list[Example], batch: int = 32, **options) -> list[Answer]:
    """Generate all examples, row r from seed r whatever the batch."""
    settings = processor.generation.replace(**options)
    found = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [tuple(chat(e.prompt, e.history)) for e in part]
        requests = [engine.Request(i, prompt, settings, start + i) for i, prompt in enumerate(prompts)]
        results = [event for event in engine.run(model, engine.fixed(requests)) if isinstance(event, Finished)]
        for result in sorted(results, key=lambda r: r.row):
            text = processor.parse(result.tokens).text
            found.append(Answer(part[result.row], text, result.stats.forwards, result.stats.blocks))
    return found


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927)."""
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return (middle - half if right else 0.0), (middle + half if right < count else 1.0)  # free of rounding at the ends


def summary(found: list[Answer]) -> dict:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in found:
        groups[answer.example.task].append(answer)
    rows = {}
    for task, part in [*groups.items(), ("all", found)]:
        right = sum(a.right for a in part)
        rows[task] = {
            "count": len(part),
            "right": right,
            "rate": right / len(part),
            "interval": wilson(right, len(part)),
            "steps_per_canvas": sum(a.steps for a in part) / sum(a.canvases for a in part),
        }
    return rows


def paired(left: list[Answer], right: list[Answer]) -> dict:
    """Two runs on the same prompts and seeds: the difference of their solve rates with its 95 % interval."""
    return quality.paired([answer.right for answer in left], [answer.right for answer in right])


def noisy_canvases(model: Model, per_task: int = 8, seed: int = 5) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Fixed (context, noisy canvas, clean canvas) triples of held-out examples, noise levels 1/8 to 8/8."""
    rng, length, triples = random.Random(seed), model.config.canvas_length, []
    for task in NAMES_OF_TASKS:
        for index in range(per_task):
            example = draw(task, rng, held=True)
            clean = np.full(length, PAD, np.int32)
            answer = [*encode(example.answer), END_OF_TURN][:length]
            clean[: len(answer)] = answer
            words = bits(seed, length=length, steps=2, block=len(triples), attempt=0, purpose=0)
            replaced = uniform(words[0]) < (index % 8 + 1) / 8
            noisy = np.where(replaced, token(words[1], model.config.text.vocab_size), clean)
            triples.append((chat(example.prompt, example.history), noisy, clean))
    return triples


def log_probabilities(model: Model, triples: list) -> np.ndarray:
    """float32 [N, C, V] of one decoder pass over every triple, no step before."""
    found = []
    for context, noisy, _ in triples:
        logits = model.inspect(model.encode(np.array([context])), noisy[None])["logits"][0]
        shifted = logits - logits.max(-1, keepdims=True)
        found.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return np.stack(found)


def divergence(expected: np.ndarray, found: np.ndarray) -> dict:
    """Mean KL in nats from ``expected`` to ``found`` (both [N, C, V] log p), and how often the argmax agrees."""
    kl = (np.exp(expected) * (expected - found)).sum(-1)
    return {"kl": float(kl.mean()), "argmax_agreement": float((expected.argmax(-1) == found.argmax(-1)).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, processor = load(options.model, backend=options.backend, dtype=options.dtype)
    rows = summary(answers(model, processor, evaluation_set(options.count)))
    for task, row in rows.items():
        low, high = row["interval"]
        print(
            f"{task:9} {row['right']:5}/{row['count']:<5} {row['rate']:6.1%}  [{low:.1%}, {high:.1%}]  "
            f"{row['steps_per_canvas']:.2f} steps per canvas"
        )
    if options.out:
        options.out.write_text(json.dumps({"model": model.describe(), "tasks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
