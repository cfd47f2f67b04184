"""The loop, with a scripted model in place of a network: what it asks for, in which order, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mlx_diffgemma.backend import CanvasView, Masks
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.events import Block, Draft, Finished
from mlx_diffgemma.sampling import engine

LENGTH, EOS, PAD = 4, 9, 0


@dataclass
class ScriptedCache:
    rows: list[list[int]]

    def select(self, rows):
        return ScriptedCache([self.rows[i] for i in rows])

    def concat(self, other):
        return ScriptedCache(self.rows + other.rows)


@dataclass(frozen=True)
class ScriptedState:
    specs: tuple
    step: int = 0


@dataclass
class ScriptedModel:
    """``script[seed][block]`` is (steps, canvas). The argmax keeps changing after a row is done, as noise would."""

    script: dict
    calls: list = field(default_factory=list)
    caches: list = field(default_factory=list)

    def __post_init__(self):
        text = type("Text", (), {"vocab_size": 100})
        self.config = type("Config", (), {"canvas_length": LENGTH, "text": text})

    def peak_memory(self):
        return 0

    def encode(self, tokens, cache=None, *, lengths=None, score=False):
        cache = cache or ScriptedCache([[] for _ in tokens])
        for row, new, count in zip(cache.rows, tokens, lengths, strict=True):
            row += new[:count].tolist()
        return cache

    def begin(self, cache, specs, *, commit=None):
        if commit is not None:
            self.encode(commit[0], cache, lengths=commit[1])
        self.calls.append("begin")
        self.caches.append([list(row) for row in cache.rows])
        return ScriptedState(tuple(specs))

    def step(self, state):
        self.calls.append("step")
        return replace(state, step=state.step + 1)

    def read(self, state):
        self.calls.append("read")
        plans = [self.script[spec.seed][spec.block] for spec in state.specs]
        steps = np.array([min(state.step, plan[0]) for plan in plans], np.int32)
        argmax = np.stack([np.array(plan[1]) if taken == plan[0] else np.full(LENGTH, 50 + state.step)
                           for plan, taken in zip(plans, steps, strict=True)])  # fmt: skip
        zeros = np.zeros(argmax.shape, np.float32)
        done = np.array([taken == plan[0] for plan, taken in zip(plans, steps, strict=True)])
        return CanvasView(argmax, argmax, zeros > 1, zeros, zeros, done, steps)


SETTINGS = GenerationConfig(max_tokens=100, eos_token_ids=(EOS,), pad_token_id=PAD)


def request(row, seed, settings=SETTINGS, **given):
    return engine.Request(row, (1, 2, seed), settings, seed, **given)


def results(events):
    return {event.row: event for event in events if isinstance(event, Finished)}


def test_forwards_equal_steps_and_each_step_waits_for_the_flag():
    model = ScriptedModel({3: {0: (5, [1, 2, 3, 4]), 1: (2, [5, EOS, 7, 8])}})
    done = results(engine.run(model, engine.fixed([request(0, 3)])))[0]
    assert model.calls == ["begin", *["step", "read"] * 5, "begin", *["step", "read"] * 2]
    assert done.stats.forwards == 7 and done.stats.steps_per_block == (5, 2)
    assert done.tokens == (1, 2, 3, 4, 5) and done.canvases == ((1, 2, 3, 4), (5, EOS, PAD, PAD))
    assert done.finish_reason == "stop" and done.stats.tokens_per_forward == 6 / 7


def test_a_finished_row_stays_as_it_stopped_and_leaves_before_the_next_block():
    model = ScriptedModel({3: {0: (1, [1, EOS, 3, 4])}, 4: {0: (3, [1, 1, 1, 1]), 1: (1, [EOS, 0, 0, 0])}})
    events = list(engine.run(model, engine.fixed([request(0, 3), request(1, 4)])))
    drafts = [(e.row, e.block, e.step) for e in events if isinstance(e, Draft)]
    assert drafts == [(0, 0, 1), (1, 0, 1), (1, 0, 2), (1, 0, 3), (1, 1, 1)]
    assert results(events)[0].tokens == (1,) and results(events)[1].tokens == (1, 1, 1, 1)
    assert model.caches[1] == [[1, 2, 4, 1, 1, 1, 1]], "row 0 must be gone, row 1 must hold its first canvas"


def test_the_last_canvas_is_not_read_back():
    model = ScriptedModel({3: {0: (1, [1, 2, 3, 4])}})
    list(engine.run(model, engine.fixed([request(0, 3, replace(SETTINGS, max_tokens=4))])))
    assert model.caches == [[[1, 2, 3]]]


def test_max_tokens_cuts_the_visible_text_and_keeps_the_canvases():
    model = ScriptedModel({3: {0: (1, [1, 2, 3, 4]), 1: (1, [5, 6, 7, 8])}})
    done = results(engine.run(model, engine.fixed([request(0, 3, replace(SETTINGS, max_tokens=6))])))[0]
    assert done.tokens == (1, 2, 3, 4, 5, 6) and done.finish_reason == "length"
    assert done.canvases == ((1, 2, 3, 4), (5, 6, 7, 8))


@pytest.mark.parametrize(("limit", "reason"), [(2, "stop"), (1, "length")])
def test_an_end_at_the_limit_is_a_stop(limit, reason):
    model = ScriptedModel({3: {0: (1, [1, 2, EOS, 4])}})
    done = results(engine.run(model, engine.fixed([request(0, 3, replace(SETTINGS, max_tokens=limit))])))[0]
    assert done.finish_reason == reason and len(done.tokens) == limit


def test_the_caller_can_end_a_row():
    model = ScriptedModel({3: {0: (1, [1, 2, 3, 4])}})
    done = results(engine.run(model, engine.fixed([request(0, 3, ended=lambda tokens: 3 in tokens)])))[0]
    assert done.finish_reason == "stop"


def test_rows_join_between_blocks():
    model = ScriptedModel({3: {0: (1, [1, 1, 1, 1]), 1: (1, [EOS, 0, 0, 0])}, 4: {0: (1, [2, EOS, 0, 0])}})
    queue = [[request(0, 3)], [request(1, 4)], None]
    done = results(engine.run(model, lambda running: queue.pop(0)))
    assert done[0].tokens == (1, 1, 1, 1) and done[1].tokens == (2,)
    assert model.caches[1] == [[1, 2, 3, 1, 1, 1, 1], [1, 2, 4]]


def test_closing_cancels_within_one_step():
    model = ScriptedModel({3: {0: (40, [1, 2, 3, 4])}})
    events = engine.run(model, engine.fixed([request(0, 3)]))
    next(events), next(events)
    events.close()
    assert model.calls.count("step") == 2


def test_a_row_with_nothing_to_decide_takes_no_step():
    model = ScriptedModel({3: {0: (0, [1, 2, EOS, 4])}})
    clamp = Masks(clamp=np.array([1, 2, EOS, 4]))
    events = list(engine.run(model, engine.fixed([request(0, 3, masks=(clamp,))])))
    assert "step" not in model.calls and [type(e) for e in events] == [Block, Finished]
    assert results(events)[0].stats.forwards == 0
