"""What a person gets wrong: the same one line through the Python API and on the command line, with status 2."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mlx_diffgemma as m
from mlx_diffgemma import backend as backends
from mlx_diffgemma import reference
from mlx_diffgemma.commands import generate
from mlx_diffgemma.errors import BackendError, CheckpointError, ConfigError, MemoryBudgetError, OptionError
from mlx_diffgemma.hub import DEMO

NORM = "model.decoder.norm.weight"


@dataclasses.dataclass(frozen=True)
class Mistake:
    """``folder`` damages a copy of the demo; ``load`` and ``call`` are options, by their Python names."""

    kind: type[Exception]
    parts: tuple[str, ...]
    folder: Callable[[Path], Any] | None = None
    model: str = "demo"
    load: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = "words 347"
    world: Callable[[pytest.MonkeyPatch], Any] | None = None


def edited(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return rewrite


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2_000_000)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def nothing_installed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backends, "installed", lambda module: False)


MISTAKES = {
    "missing folder": Mistake(FileNotFoundError, ("'/no/such/folder'", "hub name like"), model="/no/such/folder"),
    "a file": Mistake(FileNotFoundError, ("config.json", "folder it is in"), model=str(DEMO / "config.json")),
    "no name": Mistake(FileNotFoundError, ("''", "hub name like"), model=""),
    "a strange user": Mistake(FileNotFoundError, ("~nobody-here/x", "user"), model="~nobody-here/x"),
    "no config": Mistake(FileNotFoundError, ("config.json", "needs it"), folder=without("config.json")),
    "no weights": Mistake(FileNotFoundError, (".safetensors", "download"), folder=without("model.safetensors")),
    "no tokenizer": Mistake(FileNotFoundError, ("tokenizer.json", "download"), folder=without("tokenizer.json")),
    "no template": Mistake(OptionError, ("chat_template.jinja", "put"), folder=without("chat_template.jinja")),
    "wrong model type": Mistake(ConfigError, ("model_type", "'llama'"), folder=edited(model_type="llama")),
    "missing tensor": Mistake(CheckpointError, (NORM, "lacks", "again"), folder=tensors(lambda t: t.pop(NORM))),
    "extra tensor": Mistake(
        CheckpointError, ("adapter.a", "one model"), folder=tensors(lambda t: t.update({"adapter.a": torch.zeros(2)}))
    ),
    "misshapen tensor": Mistake(
        CheckpointError, (NORM, "(3,)", "(128,)"), folder=tensors(lambda t: t.update({NORM: torch.zeros(3)}))
    ),
    "truncated shard": Mistake(CheckpointError, ("model.safetensors", "truncated", "again"), folder=truncate),
    "prompt past the context": Mistake(OptionError, ("2,0", "1,024", "shorten"), prompt="a" * 2000),
    "empty prompt": Mistake(OptionError, ("prompt is empty",), prompt="  "),
    "temperatures crossed": Mistake(OptionError, ("t_max=0.3", "t_min=0.4"), call={"t_max": 0.3}),
    "temperatures equal": Mistake(OptionError, ("t_max=0.4", "t_min=0.4"), call={"t_max": 0.4}),
    "no tokens": Mistake(OptionError, ("max_tokens=0", "at least 1"), call={"max_tokens": 0}),
    "steps": Mistake(OptionError, ("max_denoising_steps=-1",), call={"max_denoising_steps": -1}),
    "bound": Mistake(OptionError, ("entropy_bound=nan",), call={"entropy_bound": float("nan")}),
    "seed": Mistake(OptionError, ("seed=-1", "2^64"), call={"seed": -1}),
    "thinking without a mode": Mistake(OptionError, ("enable_thinking=True",), call={"enable_thinking": True}),
    "cannot fit": Mistake(
        MemoryBudgetError,
        ("'reference'", "0.0 GB are free", "smaller checkpoint"),
        world=lambda patch: patch.setattr(reference, "memory", lambda device: 1_000_000),
    ),
    "backend not installed": Mistake(
        BackendError, ("'mlx'", "pip install"), load={"backend": "mlx"}, world=nothing_installed
    ),
    "no backend at all": Mistake(BackendError, ("pip install",), load={"backend": "auto"}, world=nothing_installed),
    "unknown backend": Mistake(OptionError, ("'vulkan'", "reference"), load={"backend": "vulkan"}),
    "no GPU": Mistake(
        BackendError,
        ("NVIDIA", "'cpu'"),
        load={"backend": "cuda"},
        world=lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False),
    ),
    "dtype": Mistake(OptionError, ("dtype='int3'", "bfloat16"), load={"dtype": "int3"}),
    "dtype of the reference": Mistake(OptionError, ("dtype='bfloat16'", "float32"), load={"dtype": "bfloat16"}),
}


@pytest.fixture(params=MISTAKES)
def mistake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mistake:
    found = MISTAKES[request.param]
    if found.world:
        found.world(monkeypatch)
    if found.folder:
        folder = shutil.copytree(DEMO, tmp_path / "copy")
        found.folder(folder)
        found = dataclasses.replace(found, model=str(folder))
    return dataclasses.replace(found, load={"backend": "reference"} | found.load)


def test_in_python(mistake: Mistake):
    """The right class, on one line, with the value and what to do about it."""
    with pytest.raises(mistake.kind) as error:
        m.generate(*m.load(mistake.model, **mistake.load), mistake.prompt, **mistake.call)
    message = str(error.value)
    assert type(error.value) is mistake.kind
    assert "\n" not in message and all(part in message for part in mistake.parts), message
    assert isinstance(error.value, m.UserError | FileNotFoundError)


def test_on_the_command_line(mistake: Mistake, capsys: pytest.CaptureFixture[str]):
    """One line on stderr, nothing on stdout, status 2."""
    arguments = ["--model", mistake.model, "--prompt", mistake.prompt]
    for name, value in (mistake.load | mistake.call).items():
        flag = "--thinking" if name == "enable_thinking" else f"--{name.replace('_', '-')}={value}"
        arguments.append(flag)
    assert generate.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("mlx_diffgemma.generate: ")
    assert all(part in captured.err for part in mistake.parts), captured.err


def test_nothing_is_loaded_into_a_machine_it_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    """The refusal comes before the first weight is read, not after the swapping began."""
    read: list[str] = []
    monkeypatch.setattr("mlx_diffgemma.formats.checkpoint.Checkpoint.read", lambda self, name: read.append(name))
    monkeypatch.setattr(reference, "memory", lambda device: 4_000_000)
    with pytest.raises(MemoryBudgetError):
        m.load("demo", backend="reference")
    assert read == []


def test_float32_takes_twice_the_memory_of_the_files(monkeypatch: pytest.MonkeyPatch):
    """The demo has 3.8 MB in bfloat16; as float32 it needs 7.6, and a tenth for the work."""
    monkeypatch.setattr(reference, "memory", lambda device: 8_000_000)
    with pytest.raises(MemoryBudgetError, match="on backend 'reference'"):
        m.load("demo", backend="reference")
    monkeypatch.setattr(reference, "memory", lambda device: 9_000_000)
    m.load("demo", backend="reference")


def test_an_unknown_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "memory", lambda device: 0)
    m.load("demo", backend="reference")


def test_through_a_real_process():
    """No traceback, no warning of a library, no half a line on stdout."""
    command = [sys.executable, "-m", "mlx_diffgemma", "generate", "--model", "/no/such/folder", "--prompt", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "/no/such/folder" in done.stderr


def test_an_unknown_option_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        generate.main(["--prompt", "hi", "--max-new-tokens", "5"])
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "'--max-new-tokens'" in captured.err
