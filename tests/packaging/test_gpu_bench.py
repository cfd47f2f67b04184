"""All calls of the GPU benchmark without a GPU, tiny: parts, protocol, peer, a whole run, failures, order and time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_ours, gpu_peer, gpu_report
from benchmarks.gpu_clock import HostClock
from benchmarks.gpu_floor import PARTS
from benchmarks.gpu_parts import current, recorded, tail
from benchmarks.gpu_plan import Budget, Job, Plan, until_of
from benchmarks.gpu_record import Record, machine, problems
from benchmarks.gpu_stage import BROKEN, Effort, Stage, work
from mlx_diffgemma.config import ModelConfig
from tests.tiny import official_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> dict:
    return official_config(16).to_dict()


@pytest.fixture(scope="module")
def config(data: dict) -> ModelConfig:
    return ModelConfig.from_dict(data)


# ---- parts


@pytest.fixture(scope="module")
def stage(data: dict, config: ModelConfig) -> Stage:
    """Everything as on a GPU, but for graphs and events: float32, plain operations, a host's clock."""
    effort = Effort(
        seconds=0.0, rounds=1, protocol_prompt=20, protocol_tokens=32, peer_steps=(1, 2), bandwidth_bytes=2**20
    )
    return Stage(config, data, "bf16", HostClock(), "H200", torch.float32, kernels="ops", effort=effort)


def test_parts_are_all_of_a_step_and_its_tail_gives_its_result(stage: Stage):
    model = stage.model("bf16")
    started = gpu_ours.start(stage.clock, model, 2, 40)
    with torch.inference_mode():
        state = current(started.state)
        calls = recorded(model, state)
        again = tail(model, state, calls)()
    layers = model.config.text.num_hidden_layers
    counts = {part: sum(call.part == part for call in calls) for part in PARTS}
    assert counts == {
        "experts": layers,
        "linears": 4 * layers,
        "attention": layers,
        "head": 1,
        "soft": 3,  # the second pass and both products of the self-conditioning
        "rows": counts["rows"],
        "tail": 0,
    }
    assert counts["rows"] >= 5 * layers
    assert torch.equal(again.view(), model.step(started.state).view())
    found = gpu_ours.step_parts(stage.clock, model, started, 0)
    assert list(found) == list(PARTS) and min(found.values()) > 0


def test_the_protocol_takes_64_steps_and_no_forward_to_commit(stage: Stage):
    model = stage.model("bf16")
    found = gpu_ours.protocol(stage.clock, model, 2, rounds=1, prompt_tokens=20, tokens=64)
    assert found["forwards"] == 4 * 16 and found["tok_s"] == pytest.approx(2 * 64 / found["seconds"][0])


def test_the_protocol_notices_another_forward(stage: Stage, monkeypatch):
    model = stage.model("bf16")
    begin = type(model).begin

    def separately(self, cache, specs, *, commit=None):
        if commit is not None:
            counted.encode(commit[0], cache, lengths=commit[1])
        return begin(self, cache, specs)

    counted = None

    class Counting(gpu_ours.Counted):
        def __init__(self, *args):
            nonlocal counted
            super().__init__(*args)
            counted = self

    monkeypatch.setattr(gpu_ours, "Counted", Counting)
    monkeypatch.setattr(type(model), "begin", separately)
    with pytest.raises(AssertionError, match=r"'encode': 1.*'encode': 4"):
        gpu_ours.protocol(stage.clock, model, 1, rounds=0, prompt_tokens=20, tokens=64)


def test_a_kernel_that_fails_its_check_is_left_out_by_name(stage: Stage, config: ModelConfig, monkeypatch):
    from cuda_backend.kernels import check

    weights, asked = stage.prepare(), []

    def build(config, weights, choice, head, about):
        asked.append(choice)
        if choice.on("norm"):
            kernel = "norm"
            exec(compile(f"kernel = {kernel!r}\nraise RuntimeError('no such instruction')", check.__file__, "exec"), {})
        return choice

    monkeypatch.setattr(gpu_ours, "build", build)
    found = gpu_ours.model_of(config, weights, CPU, "bf16", kernels="fused")
    assert len(asked) == 2 and not found.on("norm") and found.on("experts")
    assert found.reasons["norm"] == "failed: RuntimeError: no such instruction"


# ---- the peer


def test_the_peer_runs_on_our_tensors_and_gives_our_logits(stage: Stage, data: dict, config: ModelConfig):
    from transformers import DynamicCache

    weights = stage.prepare()
    official = gpu_peer.official(data, config, weights, CPU)
    layer, bank = official.model.decoder.layers[0], weights.layers[0].experts.gate_up_proj.values
    assert layer.experts.gate_up_proj.data_ptr() == bank.data_ptr()
    assert official.model.encoder.language_model.layers[0].experts.gate_up_proj.data_ptr() == bank.data_ptr()
    assert layer.self_attn.q_proj.weight.data_ptr() == weights.layers[0].self_attn.qkv_proj.values.data_ptr()
    assert gpu_peer.in_force(official) == {"experts": ["grouped_mm"], "attention": "sdpa"}
    ids, canvas = np.array([gpu_ours.prompt(config, 20)]), np.array([gpu_ours.prompt(config, 16, row=3)])
    model = stage.model("bf16")
    ours = model.inspect(model.encode(ids), canvas)["logits"]
    options = {"past_key_values": DynamicCache(config=official.config.text_config)}
    with torch.no_grad():
        theirs = official(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(canvas), **options).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3)


@pytest.fixture
def steady(monkeypatch) -> None:
    """A call of the peer takes 100 ms and 50 more for every step, whatever else this machine does."""
    generate, asked = gpu_peer.generate, []

    def noting(model, config, ids, *, steps, **options):
        asked.append(steps)
        return generate(model, config, ids, steps=steps, **options)

    def wall(clock, run) -> float:
        run()
        return 0.1 + 0.05 * asked[-1]

    monkeypatch.setattr(gpu_peer, "generate", noting)
    monkeypatch.setattr(gpu_peer, "wall", wall)


def test_the_peers_step_is_a_difference(stage: Stage, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_peer, "generate", lambda *args, steps, **options: asked.append(steps))
    monkeypatch.setattr(gpu_peer, "wall", lambda clock, run: run() or 0.1 + 0.05 * asked[-1])
    assert gpu_peer.step_ms(stage.clock, None, stage.config, prompt_tokens=20, static=False) == pytest.approx(50)
    assert asked == [2, 2, *[10, 2] * 3]
    monkeypatch.setattr(gpu_peer, "wall", lambda clock, run: run() or 1 / asked[-1])
    with pytest.raises(RuntimeError, match="less time"):
        gpu_peer.step_ms(stage.clock, None, stage.config, prompt_tokens=20, static=False)


# ---- a whole run


def test_every_figure_of_a_run(stage: Stage, tmp_path: Path, steady):
    jobs = Plan(precisions=("bf16",), heads=("bf16",), batches=(1, 2), prompts=(20, 40)).jobs("bf16")
    record = Record(tmp_path / "gpu.json")
    with torch.compiler.set_stance("force_eager"):
        assert work(stage, jobs, record, Budget(float("inf"))) == 0
    written = machine() | json.loads((tmp_path / "gpu.json").read_text())
    assert problems(written) == [] and written["skipped"] == written["errors"] == []
    assert [row["errors"] for row in written["rows"]] == [{}] * len(written["rows"])
    main, *others = written["rows"]
    missing = {name for name, value in main.items() if value is None}
    assert not missing, missing
    assert [(row["what"], row["mode"], row["batch"], row["prompt_tokens"]) for row in others] == [
        ("transformers", "eager", 1, 20),
        ("ours", "graph", 2, 20),
        ("ours", "graph", 1, 40),
        ("transformers", "static", 1, 20),
    ]
    assert all(row["ms_per_step"] > 0 for row in others)
    assert [row["ms_per_step"] for row in others if row["what"] == "transformers"] == pytest.approx([50, 50])
    assert main["routing"]["visited"] > 0.9 and main["recipe"] == "bf16"
    assert "Not measured" not in gpu_report.report(written)


def test_what_fails_is_written_down_and_the_rest_goes_on(stage: Stage, tmp_path: Path, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("out of something")

    monkeypatch.setattr(gpu_ours, "step_parts", failing)
    jobs = [Job("bf16", "bf16", 1, 20, piece) for piece in ("parts", "step")]
    record = Record(tmp_path / "gpu.json")
    assert work(stage, jobs, record, Budget(float("inf"))) == 0
    row = json.loads((tmp_path / "gpu.json").read_text())["rows"][0]
    assert row["errors"]["parts"].startswith("RuntimeError: out of something") and "failing" in row["errors"]["parts"]
    assert list(row["errors"]) == ["parts"] and row["parts_ms"] is None and row["ms_per_step"] > 0


def test_after_a_fatal_error_the_process_ends_and_goes_on_behind_it(stage: Stage, tmp_path: Path, monkeypatch):
    def fatal(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_ours, "step_parts", fatal)
    jobs = [Job("bf16", "bf16", 1, 20, piece) for piece in ("step", "parts", "routing")]
    monkeypatch.setattr(Plan, "jobs", lambda self, precision: jobs)
    record = Record(tmp_path / "gpu.json")
    record.save()
    statuses = []

    def start(precision: str, until: float) -> int:
        statuses.append(work(stage, jobs, Record(record.path), Budget(float("inf"))))
        return statuses[-1]

    gpu.measure(record.path, Plan(precisions=("bf16",)), end=1.0, start=start, now=lambda: 0.0)
    written = Record(record.path).data
    assert statuses == [BROKEN, 0]
    assert written["errors"] == [f"bf16: the process ended with status {BROKEN} after 2 of 3"]
    row = written["rows"][0]
    assert "illegal memory access" in row["errors"]["parts"] and row["ms_per_step"] > 0 and row["routing"]


def test_a_process_that_never_begins_is_not_started_again(tmp_path: Path):
    record = Record(tmp_path / "gpu.json")
    record.save()
    started = []

    def start(precision: str, until: float) -> int:
        started.append(precision)
        return 1

    gpu.measure(record.path, Plan(), end=100.0, start=start, now=lambda: 0.0)
    assert started == list(Plan().precisions)
    assert len(Record(record.path).data["errors"]) == 3


# ---- order and time


def test_what_matters_most_comes_first():
    plan = Plan()
    assert plan.precisions == ("fp8", "4bit", "bf16")
    first = [(job.head, job.batch, job.prompt, job.piece) for job in plan.jobs("fp8")[:3]]
    assert first == [("bf16", 1, 1024, piece) for piece in ("step", "fixed16", "parts")]
    assert plan.jobs("4bit")[0].head == "fp8"
    bf16 = plan.jobs("bf16")
    assert {job.head for job in bf16} == {"bf16"}
    assert [job.mode for job in bf16 if job.what == "transformers"] == ["eager", "eager", "static", "static"]
    assert bf16[-1].mode == "static", "the peer's compiler may take all the time that is left"
    for precision in plan.precisions:
        jobs = plan.jobs(precision)
        assert len(set(jobs)) == len(jobs)
    assert len(dataclasses.replace(plan, quick=True).jobs("fp8")) == 6


def test_no_job_begins_that_would_not_end_in_time(stage: Stage, tmp_path: Path):
    now = 0.0
    budget = Budget(100.0, lambda: now)
    job = Job("bf16", "bf16", 1, 20, "step")
    assert budget.refusal(job) is None
    budget.took(job, 50.0)
    now = 45.0
    assert budget.refusal(job) == "55 s left, about 60 needed"
    assert budget.refusal(dataclasses.replace(job, piece="routing")) is None
    record = Record(tmp_path / "gpu.json")
    assert work(stage, [job], record, budget) == 0
    assert record.data["rows"] == [] and record.data["skipped"] == [f"{job}: 55 s left, about 60 needed"]


def test_time_that_a_precision_leaves_goes_to_the_next():
    order = ("fp8", "4bit", "bf16")
    assert until_of("fp8", order, 560, 0) == pytest.approx(235.2)
    assert until_of("4bit", order, 560, 60) == pytest.approx(310)
    assert until_of("bf16", order, 560, 300) == 560
    assert until_of("fp8", ("fp8",), 560, 0) == 560


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA GPU is visible to torch") as caught:
        gpu.main()
    assert "\n" not in str(caught.value)


def test_make_gpu_needs_no_package_that_a_gpu_machine_may_lack():
    """The kernels' tests are collected, and the benchmark is imported, without MLX and other tests' packages."""
    absent = ("mlx", "gguf", "pyte", "mypy", "mlx_vlm")
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import pytest, benchmarks.gpu_stage, benchmarks.gpu_report
sys.exit(pytest.main(["--collect-only", "-qq", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
