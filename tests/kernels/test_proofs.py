"""What becomes a row of ``proven.json``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from tests.proofs import Proofs

A, B = Path("test_a.py"), Path("test_b.py")


def test_a_file_proves_its_kernels_if_all_of_it_has_passed():
    proofs = Proofs()
    for path, kernel in ((A, "norm"), (B, "heads")):
        proofs.of(SimpleNamespace(path=path), "cuda", print)(kernel, torch.bfloat16)
        proofs.passed(path)
    assert proofs.proven([A, B]) == [("heads", "bfloat16"), ("norm", "bfloat16")]
    assert proofs.proven([A, A, B]) == [("heads", "bfloat16")]  # a test of A failed, or never ran


def test_the_interpreter_proves_nothing():
    proofs, said = Proofs(), []
    proofs.of(SimpleNamespace(path=A), "cpu", lambda **row: said.append(row))("norm", torch.float32)
    proofs.passed(A)
    assert proofs.proven([A]) == [] and said == [{"what": "interpreted", "kernel": "norm", "dtype": "float32"}]
