"""The measures of a report against direct computation and worked examples, and what of the source is recorded."""

from __future__ import annotations

import dataclasses
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import quality, recording
from convert.questions import LEVELS, Trial, clean_canvas, noised, read_questions
from convert.recording import WITH, WITHOUT, Recording, sample
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, OptionError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding, dense, encode, grouped
from mlx_diffgemma.formats.stored import Stored
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.prompts.processor import Processor

RNG = np.random.default_rng(3)


def test_kl_of_two_coins():
    source, other = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert quality.divergence(source, other) == pytest.approx([expected])
    assert quality.divergence(source, other + 7) == pytest.approx([expected]), "logits need no normalising"


def test_kl_is_never_negative_and_zero_for_equals():
    logits = RNG.normal(0, 30, (64, 1000)).astype(np.float32)
    assert (quality.divergence(logits, logits) == 0).all()
    assert (quality.divergence(logits, logits + RNG.normal(0, 1e-6, logits.shape)) >= 0).all()
    sure = np.where(np.arange(4) == 0, 0.0, -np.inf)
    assert quality.divergence(sure, np.zeros(4)) == pytest.approx(math.log(4)), "what the source excludes adds nothing"


def test_overlap_counts_the_sources_experts():
    source, other = np.array([[1, 2, 3, 4], [1, 2, 3, 4]]), np.array([[4, 3, 2, 1], [4, 9, 8, 7]])
    assert quality.overlap(source, other).tolist() == [1.0, 0.25]


def test_the_interval_of_paired_answers():
    """100 prompts, 10 lost and 5 won: (-5 +- 1.96 sqrt(15 + 1 - 25 / 102)) / 102, half an answer more in every cell."""
    left = [True] * 90 + [False] * 10
    right = [True] * 80 + [False] * 10 + [True] * 5 + [False] * 5
    found = quality.paired(left, right)
    assert (found["only_source"], found["only_quantized"]) == (10, 5)
    assert found["difference"] == pytest.approx(-0.05)
    assert found["interval"] == pytest.approx([-0.125291, 0.027252], abs=1e-5)
    few, many = (quality.paired([True] * count, [True] * count)["interval"] for count in (4, 400))
    assert few == pytest.approx([-0.326667, 0.326667], abs=1e-5), "four answers alike prove little"
    assert many == pytest.approx([-0.004876, 0.004876], abs=1e-5)


def test_the_interval_of_a_mean_knows_that_rows_of_one_prompt_are_alike():
    values = np.array([1.0, 1.0, 2.0, 2.0, 6.0, 6.0])
    alone = quality.spread(values, range(6))
    assert alone["mean_half_interval"] == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(6))
    together = quality.spread(values, [0, 0, 1, 1, 2, 2])
    assert together["mean_half_interval"] == pytest.approx(1.96 * np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert (together["mean"], together["median"], together["max"], together["count"]) == (3.0, 2.0, 6.0, 6)
    assert quality.spread(values, [0] * 6)["mean_half_interval"] is None, "one prompt says nothing of others"


def in_memory(values: np.ndarray, encoding: Encoding) -> Stored:
    """Encoded range by range, as files are read."""
    return Stored(encoding, values.shape, (), lambda start, stop: encode(values[start:stop], encoding))


@pytest.mark.parametrize("encoding", [grouped("affine", bits=4, group_size=32), Encoding("fp8", block=16), dense()])
def test_relative_error_is_streamed_and_the_same(encoding: Encoding, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", 500)
    values = RNG.normal(size=(48, 64)).astype(ml_dtypes.bfloat16)
    source, other = in_memory(values, dense()), in_memory(values, encoding)
    assert len(list(source.chunks(500, encoding.block or 1))) > 2
    exact, found = values.astype(np.float64), encode(values, encoding).decode().astype(np.float64)
    direct = np.linalg.norm(exact - found) / np.linalg.norm(exact)
    assert quality.tensor_error(source, other).relative == pytest.approx(direct, rel=1e-6)


def test_errors_add_up_to_the_error_of_all():
    one, other = RNG.normal(size=(4, 64)), RNG.normal(size=(9, 64)).astype(np.float32) * 5
    encoding = grouped("mxfp8")
    errors = [
        quality.tensor_error(
            in_memory(v.astype(np.float32), dense("float32")), in_memory(v.astype(np.float32), encoding)
        )
        for v in (one, other)
    ]
    both = np.concatenate([one, other]).astype(np.float32)
    whole = quality.tensor_error(in_memory(both, dense("float32")), in_memory(both, encoding))
    assert quality.summed(errors).relative == pytest.approx(whole.relative)


class Planted:
    """A model whose logits are a table by token id, moved by the self-conditioning and by ``shift`` at one id."""

    def __init__(self, config: ModelConfig, shift: float = 0.0, other_expert: bool = False):
        self.config, self.shift, self.other_expert = config, shift, other_expert
        vocab = config.text.vocab_size
        self.table = np.random.default_rng(5).normal(0, 3, (vocab, vocab)).astype(np.float32)

    def encode(self, tokens: np.ndarray, *, lengths: np.ndarray) -> int:
        return len(tokens)

    def inspect(self, cache: int, canvas: np.ndarray, *, previous: Any, want: Any) -> dict[str, np.ndarray]:
        logits = self.table[canvas].copy()
        if previous is not None:
            logits += 0.1 * previous
        logits[..., 3] += self.shift
        text = self.config.text
        router = np.broadcast_to(
            np.arange(text.top_k_experts), (len(canvas), text.num_hidden_layers, canvas.shape[1], text.top_k_experts)
        ).copy()
        if self.other_expert:
            router[:, 4, :, 0] = 7
        return {"logits": logits, "router": router}


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_folder(DEMO)


def some_trials(config: ModelConfig, count: int = 5) -> list[Trial]:
    rng = np.random.default_rng(2)
    canvases = rng.integers(0, config.text.vocab_size, (count, config.canvas_length)).astype(np.int32)
    return [Trial(i, (1,) * (i + 1), canvas, 0.4 + i / 10, 1.0) for i, canvas in enumerate(canvases)]


def test_a_planted_change_has_the_kl_that_it_must_have(config: ModelConfig, tmp_path: Path):
    """Token 3 gets ``shift`` more: KL = log(1 + p (e^s - 1)) - p s, of the shaped p and s."""
    trials = some_trials(config)
    source, shift = Planted(config), 0.7
    kept = Recording(tmp_path, trials, 10, config, seed=1)
    kept.record(source)
    found = kept.compare(Planted(config, shift, other_expert=True))
    for i, trial in enumerate(trials):
        first = source.inspect(1, trial.canvas[None], previous=None, want=())["logits"][0]
        shaped = (first / np.float32(trial.temperature)).astype(np.float16).astype(np.float32)
        second = source.inspect(1, trial.canvas[None], previous=shaped[None], want=())["logits"][0]
        for mode, logits in ((WITHOUT, first), (WITH, second)):
            p = np.exp(quality.log_softmax(logits / trial.temperature))[kept.positions[i], 3]
            s = shift / trial.temperature
            expected = np.log1p(p * np.expm1(s)) - p * s
            assert np.allclose(found.kl[mode, i], expected, rtol=1e-4, atol=1e-9)
    share = 1 - 1 / config.text.top_k_experts
    assert found.experts[WITH].mean((0, 2)).tolist() == [1, 1, 1, 1, share, 1]
    moved = np.stack([source.table[t.canvas].argmax(-1) for t in trials])
    assert found.top1[WITHOUT].mean() < 1 and found.top1[WITHOUT][moved == 3].all()


def test_both_models_are_conditioned_on_the_sources_first_answer(config: ModelConfig, tmp_path: Path):
    kept = Recording(tmp_path, some_trials(config), 10, config, seed=1)
    kept.record(Planted(config))
    same = kept.compare(Planted(config))
    assert (same.kl == 0).all() and same.top1.all() and (same.experts == 1).all()
    only = kept.compare(Planted(config, 1.0), (WITH,), 2)
    assert np.isnan(only.kl[WITHOUT]).all() and only.kl[WITH].shape == (2, 10) and (only.kl[WITH] > 0).any()


def test_logits_that_are_not_numbers_are_refused(config: ModelConfig, tmp_path: Path):
    kept = Recording(tmp_path, some_trials(config), 10, config, seed=1)
    with pytest.raises(CheckpointError, match="not finite"):
        kept.record(Planted(config, math.nan))


def test_positions_are_chosen_by_the_seed_alone(config: ModelConfig, tmp_path: Path):
    def positions(seed: int) -> list:
        return Recording(tmp_path, some_trials(config), 7, config, seed).positions.tolist()

    assert positions(1) == positions(1) != positions(2)
    assert all(len(set(row)) == 7 and row == sorted(row) for row in positions(1))


def test_the_sample_keeps_to_its_budget(config: ModelConfig, tmp_path: Path, monkeypatch):
    small = sample(config, 40, tmp_path)
    assert (small.trials, small.positions) == (40, config.canvas_length)
    real = dataclasses.replace(config, canvas_length=256, text=dataclasses.replace(config.text, vocab_size=262_144))
    Usage = namedtuple("Usage", "free")
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda folder: Usage(100_000_000_000))
    large = sample(real, 800, tmp_path)
    assert large.positions == 32 and large.trials == 39 and large.nbytes <= recording.BUDGET
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda folder: Usage(1_000_000_000))
    assert sample(real, 800, tmp_path).trials == 2, "half of what is free"
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda folder: Usage(1_000))
    with pytest.raises(OptionError, match="no room for 201 MB"):
        sample(real, 800, tmp_path)


def test_answers_are_noised_as_in_training(config: ModelConfig):
    checkpoint = open_checkpoint(DEMO)
    processor, settings = Processor.from_folder(DEMO, checkpoint.generation), checkpoint.generation
    clean = clean_canvas("126", processor, 48, settings)
    assert processor.tokenizer.decode(clean[:3].tolist()) == "126"
    assert clean[3] in settings.eos_token_ids and set(clean[4:].tolist()) == {settings.pad_token_id}
    found = noised(9, (1, 2), clean, config.text.vocab_size, settings, seed=4)
    again = noised(9, (1, 2), clean, config.text.vocab_size, settings, seed=4)
    assert all(np.array_equal(a.canvas, b.canvas) for a, b in zip(found, again, strict=True))
    assert [trial.noise for trial in found] == pytest.approx([(i + 1) / LEVELS for i in range(LEVELS)], abs=0.2)
    assert found[-1].temperature == pytest.approx(settings.t_max)
    assert found[0].temperature == pytest.approx(settings.t_min + (settings.t_max - settings.t_min) / LEVELS)


def test_prompts_are_lines_or_json(tmp_path: Path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("1+1=\n\n  upper it \n")
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": [{"role": "user", "content": "x"}]}\n')
    assert [(q.prompt, q.answer) for q in read_questions(str(text))] == [("1+1=", None), ("upper it", None)]
    one, other = read_questions(str(rows))
    assert (one.answer, other.answer, other.prompt) == ("2", None, [{"role": "user", "content": "x"}])
    assert other.where.endswith("b.jsonl, line 2")
