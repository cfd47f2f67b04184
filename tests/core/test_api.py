"""load, generate, stream_generate, batch_generate: what a caller may rely on."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_diffgemma as m
from mlx_diffgemma.backend import Masks
from mlx_diffgemma.errors import CheckpointError, OptionError
from mlx_diffgemma.hub import DEMO
from tests.core.scripted import CANVAS, STEPS, Scripted, processor
from tests.terminal.fakes import BYTES, CLOSE_ID, END, OPEN_ID, PAD

TEXT = "The sky scatters blue light."  # four canvases of eight, the last one ends early
QUICK = {"max_denoising_steps": 4}


@pytest.fixture(scope="module")
def demo():
    return m.load("demo", backend="reference")


def events_of(script: Any, prompt: Any = "why", **options: Any) -> list[Any]:
    return list(m.stream_generate(Scripted(script), processor(), prompt, **options))


def blocks(events: list[Any]) -> list[m.Block]:
    return [event for event in events if isinstance(event, m.Block)]


# Loading


def test_demo_by_name_by_folder_and_by_path(demo, tmp_path: Path):
    """The demo folder is a checkpoint like any other; a ``Path`` is a folder like a text."""
    expected = m.generate(*demo, "words 347", seed=1, **QUICK)
    folder = shutil.copytree(DEMO, tmp_path / "copy")
    for name in (str(folder), folder):
        assert m.generate(*m.load(name, backend="reference"), "words 347", seed=1, **QUICK).tokens == expected.tokens


def test_a_tokenizer_of_another_model_is_refused():
    """Ids beyond the embedding read garbage on a GPU, silently."""
    model = Scripted(TEXT)
    small = dataclasses.replace(model.config.text, vocab_size=100)
    model.config = dataclasses.replace(model.config, text=small)
    with pytest.raises(CheckpointError, match="are they of one model"):
        m.generate(model, processor(), "why")
    assert model.prompts == []


# The result


def test_the_fields_of_a_result():
    result = m.generate(Scripted(TEXT), processor(), "why", seed=7)
    assert result.text == TEXT and result.thinking == ""
    assert result.tokens == tuple(map(ord, TEXT))
    assert result.finish_reason == "stop" and result.row == 0
    stats = result.stats
    assert stats.prompt_tokens == len("user: why\n") and stats.tokens == len(TEXT)
    assert stats.blocks == 4 and stats.steps_per_block == (STEPS,) * 4 and stats.forwards == 4 * STEPS
    assert stats.seed == 7 and stats.peak_memory == 1
    assert stats.tokens_per_forward == pytest.approx((len(TEXT) + 1) / (4 * STEPS))
    assert 0 < stats.time_to_first_draft < stats.time_to_first_block < stats.seconds
    assert 0 < stats.milliseconds_per_step * stats.forwards <= 1000 * stats.seconds


def test_canvases_are_uncut():
    """The cut is the caller's view; the ids beyond it stay."""
    result = m.generate(Scripted(TEXT), processor(), "why", max_tokens=10)
    assert [len(canvas) for canvas in result.canvases] == [CANVAS, CANVAS]
    assert "".join(map(chr, sum(result.canvases, ()))) == TEXT[:16]
    ended = m.generate(Scripted("Hi"), processor(), "why")
    assert ended.canvases == ((ord("H"), ord("i"), END, *[PAD] * 5),)


@pytest.mark.parametrize("most", [1, 7, 8, 9, 27, 28, 64])
def test_max_tokens_cuts(most: int):
    """At a canvas's edge, one off it, exactly the answer's length, and beyond."""
    result = m.generate(Scripted(TEXT), processor(), "why", max_tokens=most)
    assert result.text == TEXT[:most] and len(result.tokens) == min(most, len(TEXT)) == result.stats.tokens
    assert result.finish_reason == ("stop" if most >= len(TEXT) else "length")
    assert result.stats.blocks == min(-(-most // CANVAS), 4)


def test_an_empty_answer():
    result = m.generate(Scripted(""), processor(), "why")
    assert (result.text, result.tokens, result.finish_reason) == ("", (), "stop")


# Stop texts


STOPS = {
    "within a block": ("sky", "The "),
    "at a block's edge": ("y scat", "The sk"),
    "over two blocks": ("scatters", "The sky "),
    "over three blocks": ("sky scatters blue", "The "),
    "the whole answer": (TEXT, ""),
    "not there": ("green", TEXT),
    "begun and not ended": ("light...", TEXT),
    "several, the first in the text counts": (["blue", "sky", "."], "The "),
    "at the end": ("light.", "The sky scatters blue "),
}


@pytest.mark.parametrize("kind", STOPS)
def test_a_stop_text_ends_the_answer(kind: str):
    stop, expected = STOPS[kind]
    events = events_of(TEXT, stop=stop)
    assert events[-1].text == expected and events[-1].finish_reason == "stop"
    told = "".join(block.text for block in blocks(events))
    assert expected.startswith(told), "a block gave out what the stop text took back"
    assert all(TEXT.startswith(event.text.split("?")[0]) for event in events if isinstance(event, m.Draft))


def test_a_stop_text_ends_the_work():
    """Blocks after the stop are paid for and thrown away."""
    model = Scripted(TEXT)
    assert m.generate(model, processor(), "why", stop="sky").stats.blocks == 1
    assert model.steps == STEPS


def test_a_stop_text_beyond_max_tokens_does_not_count():
    result = m.generate(Scripted(TEXT), processor(), "why", stop="sky", max_tokens=6)
    assert (result.text, result.finish_reason) == ("The sk", "length")


# Events


def test_events_come_as_they_happen():
    """A list in disguise would run the whole answer before the first draft."""
    model = Scripted(TEXT)
    events = m.stream_generate(model, processor(), "why")
    assert model.steps == 0
    first = next(events)
    assert isinstance(first, m.Draft) and (first.block, first.step) == (0, 1)
    assert model.steps == 1
    next(events)
    assert model.steps == 2


def test_the_order_of_events():
    kinds = [(type(e).__name__, getattr(e, "block", None), getattr(e, "step", None)) for e in events_of(TEXT)]
    one = [("Draft", 1), ("Draft", 2), ("Draft", 3), ("Block", None)]
    assert kinds == [(k, b, s) for b in range(4) for k, s in one] + [("Finished", None, None)]


def test_drafts_blocks_and_the_end_tell_one_story():
    events = events_of(TEXT)
    drafts = {(event.block, event.step): event.text for event in events if isinstance(event, m.Draft)}
    assert drafts[0, 1] == "Th" + "?" * 6 and drafts[0, 3] == TEXT[:8]
    assert drafts[1, 2] == TEXT[:13] + "???", "a draft shows the answer from its beginning"
    texts = [block.text for block in blocks(events)]
    assert texts == [TEXT[:8], TEXT[8:16], TEXT[16:24], TEXT[24:]]
    assert [block.tokens for block in blocks(events)] == [tuple(map(ord, text)) for text in texts]
    assert sum((block.tokens for block in blocks(events)), ()) == events[-1].tokens
    assert tuple(tuple(block.canvas.tolist()) for block in blocks(events)) == events[-1].canvases


def test_a_character_of_bytes_over_two_blocks_is_given_out_whole():
    """Half a character decodes to a replacement that the next block takes back."""
    script = ["sevens ", *(BYTES + byte for byte in "é".encode()), " end"]
    events = events_of(script)
    assert [block.text for block in blocks(events)] == ["sevens ", "é end"]
    assert events[-1].text == "sevens é end"


def test_thoughts_are_no_part_of_the_answer():
    script = [OPEN_ID, "thought\nshort waves", CLOSE_ID, "Blue."]
    events = events_of(script)
    assert events[-1].text == "Blue." and events[-1].thinking == "short waves"
    assert "".join(block.text for block in blocks(events)) == "Blue."
    shown = [event.text for event in events if isinstance(event, m.Draft)]
    assert not any("thought" in text or "wave" in text for text in shown)


def test_closing_cancels():
    """Not one step more after the caller has gone."""
    model = Scripted(TEXT)
    events = m.stream_generate(model, processor(), "why")
    next(events)
    assert inspect.isgenerator(events)
    events.close()
    assert model.steps == 1
    assert list(events) == []


# Seeds and batches


UNSURE = {"max_denoising_steps": 2, "entropy_bound": 0.001, "max_tokens": 20}  # most positions stay noise


def told(demo: Any, seed: int | None) -> tuple[list[list[int]], int]:
    """Every canvas of a call as the next step reads it, noise and all, and the seed that was reported."""
    events = list(m.stream_generate(*demo, "recite jack", seed=seed, **UNSURE))
    return [event.canvas.tolist() for event in events if isinstance(event, m.Draft)], events[-1].stats.seed


def test_equal_seeds_give_equal_answers_through_all_three_doors(demo):
    options = {"seed": 11, **QUICK}
    one = m.generate(*demo, "words 347", **options)
    streamed = list(m.stream_generate(*demo, "words 347", **options))[-1]
    (batched,) = m.batch_generate(*demo, ["words 347"], **options)
    assert one.canvases == streamed.canvases == batched.canvases
    assert one.text == streamed.text == batched.text


def test_the_seed_decides(demo):
    assert told(demo, 11) == told(demo, 11) != told(demo, 12)


def test_a_drawn_seed_is_reported_and_repeats_the_answer(demo):
    (canvases, seed), (others, another) = told(demo, None), told(demo, None)
    assert seed != another and canvases != others
    assert told(demo, seed) == (canvases, seed)


def test_a_batch_is_single_calls_with_seed_plus_row(demo):
    """Rows of different length, in their own order, each with the noise of a call of its own."""
    prompts = ["words 347", "sort banana please", [{"role": "user", "content": "a"}]]
    batch = m.batch_generate(*demo, prompts, seed=5, **QUICK)
    assert [result.row for result in batch] == [0, 1, 2]
    assert [result.stats.seed for result in batch] == [5, 6, 7]
    for row, (prompt, result) in enumerate(zip(prompts, batch, strict=True)):
        single = m.generate(*demo, prompt, seed=5 + row, **QUICK)
        assert single.canvases == result.canvases and single.text == result.text


def test_seeds_of_a_batch_wrap_at_64_bits():
    batch = m.batch_generate(Scripted("a"), processor(), ["x", "y"], seed=2**64 - 1)
    assert [result.stats.seed for result in batch] == [2**64 - 1, 0]


def test_an_empty_batch():
    assert m.batch_generate(Scripted("a"), processor(), []) == []


# Options


def test_sampler_options_reach_every_block():
    names = {"t_min": 0.2, "t_max": 0.9, "entropy_bound": 0.3, "stability_threshold": None}
    names |= {"confidence_threshold": 0.5, "temperature": 0.0, "max_denoising_steps": 9}
    model = Scripted(TEXT)
    m.generate(model, processor(), "why", seed=3, **names)
    assert len(model.specs) == 4 and [spec.block for spec in model.specs] == [0, 1, 2, 3]
    for spec in model.specs:
        assert {name: getattr(spec.settings, name) for name in names} == names
        assert spec.seed == 3


def test_the_checkpoints_own_values_rule_where_nothing_is_said():
    model = Scripted(TEXT)
    own = processor(t_min=0.1, max_denoising_steps=5)
    m.generate(model, own, "why", t_max=0.7)
    assert model.specs[0].settings == own.generation.replace(t_max=0.7)


def test_system_and_thinking_reach_the_template():
    model = Scripted("a")
    m.generate(model, processor(), "why", system="be brief", enable_thinking=True)
    m.generate(model, processor(), [{"role": "user", "content": "why"}], enable_thinking=False)
    assert model.prompts == ["system: be brief\nuser: why\nthink\n", "user: why\n"]


def test_masks_reach_their_block_and_are_checked():
    held = Masks(clamp=np.full(CANVAS, 65, np.int32))
    model = Scripted(TEXT)
    m.generate(model, processor(), "why", masks=[Masks(), held])
    assert [spec.masks.clamp is not None for spec in model.specs] == [False, True, False, False]


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown": ({"max_new_tokens": 5}, ("'max_new_tokens'", "max_tokens")),
    "unknown too": ({"top_p": 0.9}, ("'top_p'",)),
    "seed a text": ({"seed": "7"}, ("seed='7'",)),
    "seed negative": ({"seed": -1}, ("seed=-1",)),
    "seed too large": ({"seed": 2**64}, (f"seed={2**64}",)),
    "seed a truth": ({"seed": True}, ("seed=True",)),
    "stop empty": ({"stop": ["a", ""]}, ("stop=", "''")),
    "stop a number": ({"stop": 5}, ("stop=5",)),
    "stop of numbers": ({"stop": [5]}, ("stop=[5]",)),
    "thinking a text": ({"enable_thinking": "yes"}, ("enable_thinking='yes'",)),
    "system a number": ({"system": 5}, ("content 5",)),
    "masks one": ({"masks": Masks()}, ("masks=",)),
    "masks arrays": ({"masks": [np.zeros(CANVAS)]}, ("masks=",)),
    "masks too short": ({"masks": [Masks(clamp=np.zeros(CANVAS - 1, np.int32))]}, ("clamp", "(7,)", "(8,)")),
    "masks of strange ids": ({"masks": [Masks(init=np.full(CANVAS, 5_000_000))]}, ("init", "5000000")),
    "no tokens": ({"max_tokens": 0}, ("max_tokens=0",)),
    "tokens a text": ({"max_tokens": "5"}, ("max_tokens='5'",)),
    "steps": ({"max_denoising_steps": 0}, ("max_denoising_steps=0",)),
    "temperatures": ({"t_min": 0.8, "t_max": 0.8}, ("t_max=0.8", "t_min=0.8")),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("door", [m.generate, m.stream_generate, m.batch_generate], ids=lambda door: door.__name__)
def test_a_wrong_option_is_refused_by_the_call_itself(kind: str, door: Any):
    """By name, before any work; a generator must not wait for its first event to complain."""
    options, parts = WRONG[kind]
    model = Scripted(TEXT)
    with pytest.raises(OptionError) as error:
        door(model, processor(), ["why"] if door is m.batch_generate else "why", **options)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)
    assert model.prompts == [] and model.steps == 0


@pytest.mark.parametrize("prompts", ["why", {"role": "user", "content": "why"}, 5, None], ids=repr)
def test_batch_generate_takes_a_list(prompts: Any):
    """A text is a sequence of letters: a batch of three would answer each."""
    with pytest.raises(OptionError, match="list of prompts"):
        m.batch_generate(Scripted(TEXT), processor(), prompts)
    with pytest.raises(OptionError, match="one list of messages"):
        m.batch_generate(Scripted(TEXT), processor(), [{"role": "user", "content": "why"}])


def test_a_prompt_past_the_context():
    """256 positions: prompt, and max_tokens rounded up to whole canvases."""
    fits = "x" * (256 - 64 - len("user: \n"))
    assert m.generate(Scripted("a"), processor(), fits).text == "a"
    model = Scripted("a")
    for prompt, options in ((fits + "x", {}), (fits, {"max_tokens": 65})):
        with pytest.raises(OptionError, match="max_tokens"):
            m.generate(model, processor(), prompt, **options)
    assert model.prompts == []
