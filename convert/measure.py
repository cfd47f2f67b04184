"""What a quantization cost, measured: one model after the other in memory, and all figures in one dict.

    errors of the weights -> source: answers, trials, recording -> quantized: answers, comparison -> module by module

``report`` says what is compared and shows the figures; ``quality`` has the formulas.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.backend import Choice, LoadOptions, Model, implementation
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.formats import Checkpoint
from mlx_diffgemma.memory import check_fit
from mlx_diffgemma.prompts.processor import Processor

from . import quality
from .edges import Error
from .quality import Group
from .questions import (
    LEVELS,
    Outcome,
    Question,
    Trial,
    clean_canvas,
    contexts,
    from_trajectory,
    generate,
    noised,
)
from .recording import MODES, WITH, Comparison, Recording, Sample, sample

AFFORDABLE = 180.0  # seconds that the table by module may take without being asked for
FEW_TRIALS = 32  # for the table by module, where all would take longer
BINS = 4  # of the noise level, in the figures by noise


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Args:
        dtype: that both models compute in.
        steps_limit: replaces max_denoising_steps where answers are generated.
        by_module: whether to load a hybrid per group; ``None`` when it is estimated to take ``AFFORDABLE`` at most.
        itself: the source holds the other's own values, dequantized.
        tell: is called with what is being done.
    """

    choice: Choice
    dtype: str
    seed: int = 0
    steps_limit: int | None = None
    by_module: bool | None = None
    itself: bool = False
    tell: Callable[[str], None] = lambda text: None

    def load(self, checkpoint: Checkpoint) -> Model:
        """Raises ``MemoryBudgetError`` when it cannot fit."""
        options = LoadOptions(self.dtype)
        check_fit(self.choice, checkpoint.config, checkpoint.nbytes, checkpoint, options)
        return implementation(self.choice).load(checkpoint, device=self.choice.device, dtype=self.dtype)


@dataclass(frozen=True)
class Exam:
    """What both models are asked, as far as it does not depend on either.

    Args:
        settings: one per question; those without an answer get one canvas, the others what ``base`` says.
        order: the questions that become trials.
    """

    questions: Sequence[Question]
    prompts: Sequence[tuple[int, ...]]
    base: GenerationConfig
    settings: Sequence[GenerationConfig]
    processor: Processor
    sample: Sample
    order: Sequence[int]


def measure(source: Checkpoint, other: Checkpoint, questions: Sequence[Question], setup: Setup) -> dict[str, Any]:
    """All figures, as JSON has them.

    Raises:
        UserError: a prompt that does not fit, a model that cannot be loaded, no room for temporary files.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlx-diffgemma-report-", ignore_cleanup_errors=True) as name:
        exam = prepare(source, questions, setup, Path(name))
        setup.tell("comparing the weights")
        errors = {} if setup.itself else weight_errors(source, other)
        setup.tell("asking the source")
        recording, expected, notes = _source(source, exam, setup, Path(name))
        gc.collect()
        setup.tell("asking the quantized model")
        model = setup.load(other)
        found = generate(model, exam.processor, exam.prompts, exam.settings, setup.seed)
        comparison, described = recording.compare(model), model.describe()
        del model
        gc.collect()
        modules = by_module(source, other, changed(other, errors), recording, setup, notes)
        figures = {
            "layers": source.config.text.num_hidden_layers,
            "canvas": {mode: canvas_figures(comparison, recording.trials, i) for i, mode in enumerate(MODES)},
            "generation": generation_figures(questions, expected, found),
            "weights": weight_figures(source, other, errors),
            "modules": modules,
            "sampled": _sampled(exam, recording, setup),
            "settings": dataclasses.asdict(exam.base),
            "models": {"source": notes["describe"], "quantized": described},
        }
    return figures | {"seconds": time.perf_counter() - begun}


def prepare(source: Checkpoint, questions: Sequence[Question], setup: Setup, folder: Path) -> Exam:
    processor, config = Processor.from_folder(source.folder, source.generation), source.config
    base = source.generation
    if setup.steps_limit is not None:
        base = base.replace(max_denoising_steps=setup.steps_limit)
    one = base.replace(max_tokens=config.canvas_length)
    settings = [one if question.answer is None else base for question in questions]
    prompts = contexts(questions, processor, config, settings)
    chosen = sample(config, LEVELS * len(questions), folder)
    order = np.random.default_rng(setup.seed).permutation(len(questions))[: -(-chosen.trials // LEVELS)]
    return Exam(questions, prompts, base, settings, processor, chosen, order.tolist())


def _source(
    checkpoint: Checkpoint, exam: Exam, setup: Setup, folder: Path
) -> tuple[Recording, list[Outcome], dict[str, Any]]:
    begun = time.perf_counter()
    model = setup.load(checkpoint)
    loaded = time.perf_counter()
    outcomes = generate(model, exam.processor, exam.prompts, exam.settings, setup.seed)
    recording = Recording(
        folder, trials(exam, outcomes, checkpoint, setup.seed), exam.sample.positions, checkpoint.config, setup.seed
    )
    asked = time.perf_counter()
    recording.record(model)
    notes = {
        "describe": model.describe(),
        "load_seconds": loaded - begun,
        "trial_seconds": (time.perf_counter() - asked) / len(recording.trials) / len(MODES),
    }
    return recording, outcomes, notes


def trials(exam: Exam, outcomes: Sequence[Outcome], checkpoint: Checkpoint, seed: int) -> list[Trial]:
    """Of the chosen questions in their order, up to the number that the sample allows."""
    found: list[Trial] = []
    for i in exam.order:
        answer, settings = exam.questions[i].answer, exam.settings[i]
        if answer is None:
            found += from_trajectory(i, exam.prompts[i], outcomes[i], settings)
        else:
            clean = clean_canvas(answer, exam.processor, checkpoint.config.canvas_length, settings)
            found += noised(i, exam.prompts[i], clean, checkpoint.config.text.vocab_size, settings, seed)
    return found[: exam.sample.trials]


def weight_errors(source: Checkpoint, other: Checkpoint) -> dict[str, Error]:
    """By tensor, of those that both have: a text-only checkpoint has no vision tower."""
    names = [name for name in source.table if name in other.table]
    return {name: quality.tensor_error(source.tensors[name], other.tensors[name]) for name in names}


def changed(other: Checkpoint, errors: Mapping[str, Error]) -> dict[Group, list[str]]:
    """The groups that are quantized, or hold other values than the source's."""
    names = {name for name, stored in other.tensors.items() if stored.encoding.quantized}
    return quality.groups(other, names | {name for name, error in errors.items() if error.lost})


def by_module(
    source: Checkpoint,
    other: Checkpoint,
    groups: Mapping[Group, Sequence[str]],
    recording: Recording,
    setup: Setup,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """KL with self-conditioning when one group alone is quantized; one model is loaded per group."""

    def cost(trials: int) -> float:
        return len(groups) * (notes["load_seconds"] + trials * notes["trial_seconds"])

    every = len(recording.trials)
    count = every if cost(every) <= AFFORDABLE else min(FEW_TRIALS, every)
    estimate = cost(count)
    head = {"groups": len(groups), "trials": count, "estimated_seconds": estimate}
    wanted = estimate <= AFFORDABLE if setup.by_module is None else setup.by_module
    if not wanted or not groups:
        return head | {"kl": None}
    rows = []
    for number, ((layer, role), names) in enumerate(groups.items(), 1):
        setup.tell(f"module {number} of {len(groups)}: {group_name(layer, role)}")
        model = setup.load(quality.hybrid(source, other, names))
        found = recording.compare(model, (WITH,), count)
        rows.append({"layer": layer, "role": role, "kl": float(found.kl[WITH].mean())})
        del model
        gc.collect()
    return head | {"kl": rows}


def group_name(layer: int | None, role: str) -> str:
    return role if layer is None else f"{role} of layer {layer}"


def canvas_figures(found: Comparison, trials: Sequence[Trial], mode: int) -> dict[str, Any]:
    kl, top1, experts = found.kl[mode], found.top1[mode], found.experts[mode]
    noise = np.array([trial.noise for trial in trials])
    bins = np.minimum((noise * BINS).astype(int), BINS - 1)
    layers = [float(share) for share in experts.mean((0, 2))]
    return {
        "kl": quality.spread(kl, [trial.question for trial in trials]),
        "top1": float(top1.mean()),
        "experts": {"mean": float(experts.mean()), "layers": layers},
        "by_noise": [
            {
                "noise": [at / BINS, (at + 1) / BINS],
                "trials": int((bins == at).sum()),
                "kl": float(kl[bins == at].mean()),
                "top1": float(top1[bins == at].mean()),
            }
            for at in sorted(set(bins.tolist()))
        ],
    }


def generation_figures(
    questions: Sequence[Question], expected: Sequence[Outcome], found: Sequence[Outcome]
) -> dict[str, Any]:
    """Both models' answers to the same prompts from the same seeds."""
    answered = [i for i, question in enumerate(questions) if question.answer is not None]
    both: dict[str, Any] = {"prompts": len(questions), "with_answer": len(answered)}
    rights = []
    for name, outcomes in (("source", expected), ("quantized", found)):
        steps, canvases = sum(o.steps for o in outcomes), sum(o.canvases for o in outcomes)
        right = [outcomes[i].text.strip() == (questions[i].answer or "").strip() for i in answered]
        rights.append(right)
        both[name] = {
            "steps": steps,
            "canvases": canvases,
            "steps_per_canvas": steps / canvases,
            "right": sum(right) if answered else None,
            "rate": sum(right) / len(right) if answered else None,
        }
    both["same_text"] = sum(a.text == b.text for a, b in zip(expected, found, strict=True))
    both["answers"] = quality.paired(*rights) if answered else None
    return both


def weight_figures(source: Checkpoint, other: Checkpoint, errors: Mapping[str, Error]) -> dict[str, Any] | None:
    """Relative errors by role, by group, and by tensor; ``None`` where there is nothing to compare."""
    if not errors:
        return None
    roles: dict[str, list[Error]] = {}
    for name, error in errors.items():
        roles.setdefault(source.table[name].role, []).append(error)
    return {
        "roles": {role: quality.summed(rows).relative for role, rows in roles.items()},
        "groups": [
            {"layer": layer, "role": role, "relative": quality.summed(errors[name] for name in names).relative}
            for (layer, role), names in quality.groups(other, errors).items()
        ],
        "tensors": {
            name: {
                "relative": error.relative,
                "source": source.tensors[name].format,
                "format": other.tensors[name].format,
            }
            for name, error in errors.items()
        },
    }


def _sampled(exam: Exam, recording: Recording, setup: Setup) -> dict[str, Any]:
    """What was measured, for people and for whoever wants to do it again."""
    canvas, positions = recording.config.canvas_length, recording.positions.shape[1]
    return {
        "seed": setup.seed,
        "trials": len(recording.trials),
        "prompts": len({trial.question for trial in recording.trials}),
        "positions": positions,
        "canvas_length": canvas,
        "temporary_bytes": exam.sample.nbytes,
        "kl": f"nats of the shaped distribution (logits by temperature), {positions} of {canvas} positions per canvas",
        "top1_and_experts": "all positions",
        "self_conditioning": "the source's shaped logits of the same canvas, rounded to float16, for both models",
        "temperatures": [trial.temperature for trial in recording.trials],
        "noise": [trial.noise for trial in recording.trials],
        "questions": [trial.question for trial in recording.trials],
    }
