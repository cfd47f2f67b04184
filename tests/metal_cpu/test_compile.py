"""The cache of compiled kernels, and which compiler fills it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.metal_cpu import compile as under_test

SOURCE = 'extern "C" int answer() { return 42; }\n'


def test_several_may_build_the_same_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(under_test, "BUILD", tmp_path / "build")
    with ThreadPoolExecutor(4) as pool:
        built = set(pool.map(lambda _: under_test.build(SOURCE, []), range(4)))
    assert len(built) == 1 and set(under_test.BUILD.iterdir()) == built


def test_what_is_built_is_not_built_again(monkeypatch, tmp_path):
    monkeypatch.setattr(under_test, "BUILD", tmp_path)
    first = under_test.build(SOURCE, [])
    assert under_test.build(SOURCE, ["-DOTHER"]) != first  # flags count
    monkeypatch.setattr(under_test.subprocess, "run", None)
    assert under_test.build(SOURCE, []) == first


def test_nothing_stays_of_a_text_that_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(under_test, "BUILD", tmp_path)
    with pytest.raises(under_test.NotMetal, match="clang refuses"):
        under_test.build("nonsense", [])
    assert not list(tmp_path.iterdir())


def test_another_compiler_may_be_named(monkeypatch):
    monkeypatch.setenv("CXX_METAL_CPU", "ccache clang++-19")
    assert under_test.compiler.__wrapped__() == ["ccache", "clang++-19"]
    monkeypatch.delenv("CXX_METAL_CPU")
    assert under_test.compiler.__wrapped__()[1] == "c++"
    monkeypatch.setattr(under_test.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="install ziglang"):
        under_test.compiler.__wrapped__()


def test_every_header_counts(monkeypatch, tmp_path):
    """A change of the library or of the engine makes new files: both are part of the key."""
    before = under_test.surroundings.__wrapped__()
    (tmp_path / "more.h").write_text("// more")
    monkeypatch.setattr(under_test, "LIBRARY", tmp_path)
    assert under_test.surroundings.__wrapped__() != before
