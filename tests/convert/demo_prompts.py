"""The packaged prompts of ``--report demo``: ``PYTHONPATH=.:demo python tests/convert/demo_prompts.py`` writes them."""

from __future__ import annotations

import json

import tasks

from convert.questions import DEMO_PROMPTS

COUNT = 200


def lines() -> str:
    """The first held-out examples of the demo's evaluation, the tasks in turn; a dialogue is a list of messages."""
    rows = []
    for example in tasks.evaluation_set(COUNT):
        prompt = example.messages if example.history else example.prompt
        rows.append(json.dumps({"task": example.task, "prompt": prompt, "answer": example.answer}))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    DEMO_PROMPTS.write_text(lines(), encoding="utf-8")
