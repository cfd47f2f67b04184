"""What becomes a row of ``proven.json``."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cuda_backend.kernels import choice
from cuda_backend.kernels.cards import CARDS
from cuda_backend.kernels.choice import KERNELS, Gpu
from tests.proofs import Proofs

ROOT = Path(__file__).parents[2]
HOPPER = Gpu("H100", 90, CARDS[90])

A, B = Path("test_a.py"), Path("test_b.py")


def test_a_file_proves_its_kernels_if_all_of_it_has_passed():
    proofs = Proofs()
    for path, kernel in ((A, "norm"), (B, "heads")):
        proofs.of(SimpleNamespace(path=path), "cuda", print)(kernel, torch.bfloat16)
        proofs.passed(path)
    assert proofs.proven([A, B]) == [("cuda", "heads", "bfloat16"), ("cuda", "norm", "bfloat16")]
    assert proofs.proven([A, A, B]) == [("cuda", "heads", "bfloat16")]  # a test of A failed, or never ran


def test_the_interpreter_proves_nothing():
    proofs, said = Proofs(), []
    proofs.of(SimpleNamespace(path=A), "cpu", lambda **row: said.append(row))("norm", torch.float32)
    proofs.passed(A)
    proofs.finish([A])
    assert proofs.written == proofs.virtual == []
    assert said == [{"what": "interpreted", "kernel": "norm", "dtype": "float32"}]


def test_proof_is_written_and_replaced(tmp_path, monkeypatch):
    path = tmp_path / "proven.json"
    path.write_text("[]\n")
    monkeypatch.setattr(choice.jit, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(choice, "gpu_of", lambda device, requested: HOPPER)
    for kernel in ("norm", "look", "norm"):
        choice.prove(kernel, "bfloat16", path)
    found = choice.proven_rows(path)
    assert [each["kernel"] for each in found] == ["look", "norm"] and found[0]["card"] == "H100"
    assert choice.is_proven("norm", 90, "bfloat16", found) and not choice.is_proven("norm", 90, "float32", found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["proven.json"] and len(path.read_text().splitlines()) == 4
    with pytest.raises(AssertionError):
        choice.prove("router", "bfloat16", path)
    monkeypatch.setattr(choice.jit, "INTERPRETED", True)
    with pytest.raises(AssertionError, match="interpreter"):
        choice.prove("norm", "bfloat16", path)


def test_every_kernel_has_a_test_that_can_prove_it():
    proving = re.compile(r'(?:proof|record\))\("(\w+)"')
    tests = [*Path(__file__).parent.glob("test_*.py"), ROOT / "tests/backends/test_graphs.py"]
    named = {name for path in tests for name in proving.findall(path.read_text())}
    assert named == {*KERNELS}
