"""The README tells the truth: its commands and programs are run, or say why not, from a small set of reasons."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
REASONS = {"needs the 26B weights", "run by .ci/run", "installs packages"}
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n+)?^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Code(NamedTuple):
    reason: str
    language: str
    text: str


def blocks(text: str) -> list[Code]:
    return [Code(*match.groups(default="")) for match in BLOCK.finditer(text)]


def test_blocks_are_found_with_their_reasons():
    text = "a\n```sh\none\n```\n\n<!-- not run: because -->\n```sh\ntwo\nthree\n```\n"
    text += "```text\nfour\n```\n```python\n5\n```\n"
    assert blocks(text) == [("", "sh", "one\n"), ("because", "sh", "two\nthree\n"), ("", "python", "5\n")]


def test_what_is_not_run_has_a_known_reason():
    text = README.read_text(encoding="utf-8")
    found = blocks(text)
    assert len(found) == len(re.findall(r"^```(?:sh|python)$", text, re.MULTILINE)), "a block is malformed"
    assert text.count("<!-- not run") == sum(bool(code.reason) for code in found), "a reason stands before no block"
    assert {code.reason for code in found} - {""} <= REASONS
    assert {"sh", "python"} <= {code.language for code in found if not code.reason}


@pytest.mark.parametrize("code", [code for code in blocks(README.read_text(encoding="utf-8")) if not code.reason])
def test_it_runs(code: Code, tmp_path: Path):
    command = (
        ["bash", "-euo", "pipefail", "-c", code.text] if code.language == "sh" else [sys.executable, "-c", code.text]
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
