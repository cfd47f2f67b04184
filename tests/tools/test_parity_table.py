"""``tests/parity/table.py``: what a test run measured, as text."""

from __future__ import annotations

import json

from tests.parity import table


def test_without_a_record_it_says_what_makes_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "REPORT", tmp_path / "none")
    assert table.main() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"no record in {tmp_path / 'none'}; run make test\n"


def test_a_model_without_figures_is_blank(capsys, monkeypatch, tmp_path):
    rows = [{"test": "t", "case": "one", "model": "mlx", "difference": 2e-6}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(table, "REPORT", tmp_path)
    assert table.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["reference", "mlx", "cpu"],
        ["one", "2.0e-06"],
        ["worst", "2.0e-06"],
    ]
    assert lines[5].split() == ["reference", "mlx", "cpu", "mlx-vlm"] and lines[6] == "worst"
