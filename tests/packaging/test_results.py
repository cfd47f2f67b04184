"""The committed benchmark results are there, whole, and meet their goals."""

from __future__ import annotations

import json
import re

import pytest
from formats import W8A8

from benchmarks import convert
from benchmarks.peers import PAIRS, RESULTS, ROOT
from convert.recipes import RECIPES

CONDITIONS = ("cpu", "cores", "system", "blas", "dtype", "prompt_tokens", "shape", "load_average", "changed")


@pytest.fixture(scope="module")
def record() -> dict:
    assert RESULTS.is_file(), "run `make bench` and commit its result"
    return json.loads(RESULTS.read_text())


def test_the_conditions_are_recorded(record: dict):
    assert not [name for name in CONDITIONS if name not in record]
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert record["threads"] >= 1
    few, many = record["steps"]
    assert many > few > 0
    assert record["rounds"] >= 3


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_measured_and_meets_its_goal(record: dict, name: str):
    pair = record["pairs"][name]
    assert len(pair["rounds"]) == record["rounds"]
    ratios = sorted(one["ours"] / one["peer"] for one in pair["rounds"])
    assert ratios[0] == pair["ratio"]["min"] and ratios[-1] == pair["ratio"]["max"]
    assert pair["goal"] == PAIRS[name].goal
    assert pair["first_draft_goal"] == PAIRS[name].first_draft
    assert pair["first_draft"]["ours"]["share"] <= (pair["first_draft_goal"] or 1)
    assert pair["ratio"]["median"] <= pair["goal"] and pair["met"]
    for side in ("ours", "peer"):
        assert {"python", "numpy"} < pair["versions"][side].keys()
        assert 0 < pair["first_draft"][side]["share"] <= 1
        assert pair["milliseconds_per_step"][side]["median"] > 0


def test_converting_is_measured_and_meets_its_goal():
    record = json.loads(convert.RESULTS.read_text())
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    rounds = list(zip(record["rounds"]["ours"], record["rounds"]["mlx-vlm"], strict=True))
    assert len(rounds) >= 3 and record["source_bytes"] > 1.4e9
    assert sorted(a["seconds"] / b["seconds"] for a, b in rounds)[len(rounds) // 2] <= 1
    assert all(a["peak_bytes"] < b["peak_bytes"] for a, b in rounds)


def test_every_recipe_is_measured_on_the_demo():
    """On 2,000 held-out prompts, paired: none may cost more than a point, within its 95 % interval."""
    formats = json.loads((ROOT / "demo" / "formats.json").read_text())["formats"]
    assert set(formats) == {*RECIPES, *(f"{recipe} W8A8" for recipe in W8A8)}
    for recipe, row in formats.items():
        assert row["count"] == 2000 and (recipe == "bf16" or row["interval"][0] > -0.01), recipe
