"""The packaged checkpoint: official format, small, every trap alive, and as good as its card says."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import tasks

from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.processor import Processor
from tests.conftest import load_model

RESULTS = Path(__file__).parents[2] / "demo" / "results.json"


def test_it_is_small():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 8_000_000


def test_every_trap_is_alive():
    checkpoint = open_checkpoint(DEMO)
    text = checkpoint.config.text
    assert [text.full(i) for i in range(6)] == [False] * 5 + [True]
    assert "model.decoder.layers.5.self_attn.v_proj.weight" not in checkpoint.table
    assert len(set(text.head_dims)) == 2 and len(set(text.num_key_value_heads)) == 2
    scalars = lambda base: [float(checkpoint.read(f"{base}.layers.{i}.layer_scalar")[0]) for i in range(6)]  # noqa: E731
    decoder, encoder = scalars("model.decoder"), scalars("model.encoder.language_model")
    assert len({*decoder, *encoder}) > 9, "layer scalars must differ, between layers and between the two roles"
    assert np.abs(checkpoint.read("model.decoder.self_conditioning.down_proj.weight").astype("float32")).max() > 0.1
    assert checkpoint.dtype == "bfloat16"


def test_the_official_class_loads_it_and_answers():
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(DEMO).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "words 347"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    out = model.generate(ids["input_ids"], max_new_tokens=48)
    assert tokenizer.decode(out.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == (
        "three hundred forty-seven"
    )


def test_solve_rate_is_the_published_one(fast_backend, record):
    """A tenth of the soak run; the rate must be inside the interval of the published 2,000 and above the floor."""
    model = load_model(DEMO, fast_backend, "float32")
    processor = Processor.from_folder(DEMO, open_checkpoint(DEMO).generation)
    rows = evaluate.summary(evaluate.answers(model, processor, tasks.evaluation_set(200)))
    published = json.loads(RESULTS.read_text())["tasks"]["all"]
    low, high = rows["all"]["interval"]
    record(model=fast_backend, case="demo 200", rate=rows["all"]["rate"], steps=rows["all"]["steps_per_canvas"])
    assert low <= published["rate"] <= high
    assert rows["all"]["rate"] > 0.8


def test_fixed_noisy_canvases_diverge_nowhere_between_models(fast_backend, record):
    reference, model = load_model(DEMO, "reference"), load_model(DEMO, fast_backend, "float32")
    triples = evaluate.noisy_canvases(reference, per_task=2)
    figures = evaluate.divergence(
        evaluate.log_probabilities(reference, triples), evaluate.log_probabilities(model, triples)
    )
    record(model=fast_backend, case="noisy canvases", **figures)
    assert abs(figures["kl"]) < 1e-5 and figures["argmax_agreement"] > 0.999


@functools.cache
def two_thousand(backend: str) -> list[evaluate.Answer]:
    processor = Processor.from_folder(DEMO, open_checkpoint(DEMO).generation)
    return evaluate.answers(load_model(DEMO, backend, "float32"), processor, tasks.evaluation_set(2000))


@pytest.mark.soak
def test_two_thousand_prompts_are_the_published_ones(fast_backend):
    published = json.loads(RESULTS.read_text())["tasks"]
    for task, row in evaluate.summary(two_thousand(fast_backend)).items():
        low, high = row["interval"]
        assert low <= published[task]["rate"] <= high, task


@pytest.mark.soak
def test_two_thousand_prompts_pairwise(record):
    """Same prompts, same seeds, both backends: the difference, with its McNemar interval, is nothing to speak of."""
    figures = evaluate.paired(two_thousand("cpu"), two_thousand("mlx"))
    record(case="2,000 prompts, torch against MLX", **figures)
    low, high = figures["interval"]
    assert low <= 0 <= high and high - low < 0.01


def test_intervals_are_those_of_the_textbook():
    assert evaluate.wilson(0, 10)[0] == 0 and evaluate.wilson(10, 10)[1] == 1
    assert evaluate.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_paired_runs_count_who_alone_was_right():
    right, wrong = (evaluate.Answer(tasks.Example("add", "1+1=", "2"), text, 2, 1) for text in ("2", "3"))
    figures = evaluate.paired([right, right, wrong, wrong], [right, wrong, wrong, wrong])
    assert (figures["only_source"], figures["only_quantized"], figures["difference"]) == (1, 0, -0.25)
