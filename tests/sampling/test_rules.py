"""The rules alone, on numbers one can follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.sampling import rules

FREE = np.ones(4, bool)


def test_temperatures_start_at_t_max_and_never_reach_t_min():
    schedule = rules.temperatures(GenerationConfig())
    assert len(schedule) == 48 and schedule[0] == np.float32(0.8)
    assert schedule[-1] == pytest.approx(0.4 + 0.4 / 48)


def test_temperature_scales_the_schedule_and_zero_leaves_it():
    plain = rules.temperatures(GenerationConfig())
    assert (rules.temperatures(GenerationConfig(temperature=0.5)) == plain * np.float32(0.5)).all()
    assert (rules.temperatures(GenerationConfig(temperature=0)) == plain).all()


def test_one_position_is_always_accepted():
    assert rules.accept(np.array([3, 2, 1, 4], np.float32), 1e-6, FREE).tolist() == [False, False, True, False]


def test_acceptance_counts_only_the_more_certain_ones():
    entropy = np.array([0.04, 0.5, 0.05, 0.9], np.float32)
    assert rules.accept(entropy, 0.1, FREE).tolist() == [True, True, True, False]  # 0.04 + 0.05 <= 0.1 admits 0.5


def test_clamped_positions_are_neither_accepted_nor_counted():
    entropy = np.array([0.0, 5.0, 0.3, 0.2], np.float32)
    free = np.array([False, False, True, True])
    assert rules.accept(entropy, 0.1, free).tolist() == [False, False, False, True]
    assert not rules.accept(entropy, 0.1, np.zeros(4, bool)).any()


def test_stability_needs_its_history():
    canvas, other = np.array([1, 2]), np.array([1, 3])
    assert rules.stable([], canvas, 0)
    assert not rules.stable([], canvas, 1)
    assert rules.stable([other, canvas], canvas, 1)
    assert not rules.stable([other, canvas], canvas, 2)


def test_confidence_is_strict_and_ignores_clamped_positions():
    entropy = np.array([0.5, 0.5, 9, 9], np.float32)
    free = np.array([True, True, False, False])
    assert not rules.confident(entropy, 0.5, free)
    assert rules.confident(entropy, 0.51, free)
    assert rules.confident(entropy, 1e-9, np.zeros(4, bool))


def test_draw_is_the_inverse_cdf_in_vocabulary_order():
    shaped = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    found = [int(rules.draw(shaped, np.array([u], np.float32))[0]) for u in (0, 0.2, 0.26, 0.7, 0.76, 1 - 2**-24)]
    assert found == [0, 0, 1, 1, 2, 2]


def test_a_banned_id_is_never_drawn():
    shaped = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    assert all(rules.draw(shaped, np.array([u], np.float32))[0] == 1 for u in (0, 0.5, 1 - 2**-24))


def test_entropy_of_known_distributions():
    assert rules.entropy(np.zeros((1, 8), np.float32))[0] == pytest.approx(np.log(8), rel=1e-6)
    assert rules.entropy(np.array([[0, -np.inf]], np.float32))[0] == 0


def test_finish_pads_after_the_first_end():
    canvas, end = rules.finish(np.array([7, 5, 9, 5]), (5,), 0)
    assert canvas.tolist() == [7, 5, 0, 0] and end == 1
    canvas, end = rules.finish(np.array([7, 5, 9, 5]), (5,), None)
    assert canvas.tolist() == [7, 5, 9, 5] and end == 1
    assert rules.finish(np.array([7, 8]), (5,), 0)[1] is None


@pytest.mark.parametrize(
    "bad",
    [
        {"t_max": 0.4}, {"t_min": -0.1}, {"max_tokens": 0}, {"max_denoising_steps": 1.5}, {"entropy_bound": 0},
        {"confidence_threshold": 0}, {"stability_threshold": -1}, {"temperature": -1}, {"t_max": float("nan")},
        {"max_tokens": True}, {"entropy_bound": "much"},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(bad):
    name = next(iter(bad))
    with pytest.raises(OptionError, match=name):
        GenerationConfig(**bad)


def test_unknown_options_are_refused():
    with pytest.raises(OptionError, match="top_k"):
        GenerationConfig().replace(top_k=5)
