"""What the GPU benchmark writes and how it is read, on a result that nothing measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_clock import HostClock
from benchmarks.gpu_floor import published
from benchmarks.gpu_picture import draw
from benchmarks.gpu_plan import Job
from benchmarks.gpu_record import Record, file_of, problems
from benchmarks.gpu_report import BEGIN, END, GOALS, NONE
from benchmarks.gpu_stage import Stage, fill_floor
from mlx_diffgemma.config import ModelConfig


def made_up(config: ModelConfig) -> dict:
    """A result with figures that nothing measured: for the layout alone, never for a file of the repository."""
    record = Record(Path("never-written.json"))
    stage = Stage(config, {}, "fp8", HostClock(), "H200")
    for precision, head, step, rate in (("fp8", "bf16", 7.0, 1850.0), ("fp8", "fp8", 7.5, 1850.0)):
        job = Job(precision, head, 1, 1024, "step")
        row = record.row(**job.identity)
        fill_floor(stage, job, row)
        row |= {"ms_per_step": step, "fixed16_tok_s": rate, "peak_gb": 29.5}
        row["parts_ms"] = {part: floor * 1.25 + 0.01 for part, floor in row["parts_floor_ms"].items()}
    record.data["rows"][1]["errors"]["eager"] = "RuntimeError: example\n  File"
    record.data["bandwidth"]["fp8"] = {"copy": 4300.0, "read": 4400.0}
    here = {"card": "NVIDIA H200", "date": "2000-01-01T00:00:00Z", "driver": "1.0", "versions": {"torch": "2.11"}}
    return record.data | here


@pytest.fixture
def result() -> dict:
    return made_up(published())


def test_a_report_has_the_row_its_parts_and_what_failed(result: dict):
    assert problems(result) == []
    text = gpu_report.report(result)
    assert "| ours | fp8 | bf16 | 1 | 1,024 | 7.00 | 6.16 | 1.14 | 1,850 |  | 29.5 |" in text
    assert "| experts | 5.966 | 4.765 | 1.25 | 22.87 | 3,834 | 87% |" in text
    assert "- ours, fp8, head fp8, batch 1, prompt 1,024, eager: RuntimeError: example" in text


def test_goals_are_judged_where_they_were_measured(result: dict):
    lines = gpu_report.goals([result]).splitlines()
    assert lines[0].endswith("7.8 ms/step at most: 7.00, met; 1,800 tok/s at least: 1,850.00, met")
    assert lines[1].endswith("7.4 ms/step at most: 7.50, missed; 1,900 tok/s at least: 1,850.00, missed")
    assert lines[2].endswith("5 ms/step at most: not measured; 2,600 tok/s at least: not measured")
    result["card"] = "NVIDIA H100 80GB HBM3"
    assert gpu_report.goals([result]).count("not measured") == 2 * len(GOALS)


def test_without_a_result_nothing_is_claimed():
    assert gpu_report.section([]) == f"{BEGIN}\n{NONE}\n{END}"
    assert gpu_report.goals([]).count("not measured") == 2 * len(GOALS)


def test_the_readme_gets_the_newest_result_of_each_card(result: dict):
    older = result | {"date": "1999-01-01T00:00:00Z", "driver": "0.9"}
    text = gpu_report.placed(f"a\n{BEGIN}\nold\n{END}\nb\n", gpu_report.section([result, older]))
    assert text.startswith(f"a\n{BEGIN}\nNVIDIA H200, 2000-01-01, driver 1.0") and text.endswith(f"{END}\nb\n")
    assert "driver 0.9" not in text and "old" not in text
    with pytest.raises(ValueError, match="no section"):
        gpu_report.placed("a", "b")


def test_the_picture_has_a_bar_and_a_floor_for_every_part(result: dict):
    image = draw(result)
    colours = image.getcolors(maxcolors=100_000)
    assert {(59, 82, 139), (94, 201, 98)} <= {colour for _, colour in colours}
    with pytest.raises(ValueError, match="no parts"):
        draw(result | {"rows": []})


def test_a_file_is_written_whole_and_read_again(tmp_path: Path):
    record = Record(tmp_path / "sub" / "gpu.json")
    job = Job("fp8", "bf16", 1, 1024, "step")
    record.row(**job.identity)["ms_per_step"] = 1.0
    record.save()
    again = Record(record.path)
    assert again.row(**job.identity)["ms_per_step"] == 1.0 and len(again.data["rows"]) == 1
    assert not list(tmp_path.rglob("*.part"))
    assert file_of("NVIDIA H100 80GB HBM3", 0).name == "gpu-nvidia-h100-80gb-hbm3-1970-01-01.json"


def test_wrong_files_are_told():
    broken = {"card": "x", "date": "", "versions": {}, "bandwidth": {}, "rows": [{"what": None, "speed": 1}]}
    found = problems(broken)
    assert "row 0: speed is unknown" in found and "row 0: what is null" in found and "row 0: head is missing" in found
    assert "rows is missing" in problems({})


def test_committed_results_are_whole_and_of_a_gpu():
    for path in gpu_report.found():
        data = json.loads(path.read_text())
        assert problems(data) == [], path
        assert data["card"] != "cpu" and data["driver"] and data["versions"]["cuda"], path
