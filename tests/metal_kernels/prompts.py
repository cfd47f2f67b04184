"""Prompts of the demo, spread over its tasks."""

from __future__ import annotations

import json
from importlib import resources


def prompts(count: int) -> list[str]:
    lines = resources.files("mlx_diffgemma").joinpath("fixtures/demo_prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: len(lines) // count]][:count]
