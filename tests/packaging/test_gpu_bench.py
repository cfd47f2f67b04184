"""The GPU benchmark without a GPU: its arithmetic, its weights, its order and time, its report; and all its calls, tiny."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_floor, gpu_ours, gpu_peer, gpu_report
from benchmarks.gpu_clock import HostClock
from benchmarks.gpu_floor import GPUS, PARTS, Load, costs, floors, load_of, published
from benchmarks.gpu_parts import current, recorded, tail
from benchmarks.gpu_picture import draw
from benchmarks.gpu_plan import Budget, Job, Plan, until_of
from benchmarks.gpu_record import Record, file_of, machine, problems
from benchmarks.gpu_report import BEGIN, END, GOALS, NONE
from benchmarks.gpu_stage import BROKEN, Effort, Stage, fill_floor, work
from benchmarks.gpu_weights import expected_bytes, random_weights
from convert.recipes import RECIPES
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.formats.encoding import Encoded, grouped
from tests.tiny import official_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data() -> dict:
    return official_config(16).to_dict()


@pytest.fixture(scope="module")
def config(data: dict) -> ModelConfig:
    return ModelConfig.from_dict(data)


# ---- floors


@pytest.mark.parametrize(
    ("card", "precision", "head", "milliseconds"),
    [
        ("H200", "fp8", "bf16", 6.15),
        ("H200", "fp8", "fp8", 5.76),
        ("H200", "bf16", "bf16", 11.3),
        ("H100 SXM", "fp8", "bf16", 8.4),
        ("H100 SXM", "bf16", "bf16", 15.7),
        ("RTX 5090", "fp8", "bf16", 19.3),
    ],
)
def test_floors_are_those_of_the_plan(card: str, precision: str, head: str, milliseconds: float):
    found = floors(load_of(published(), precision, head), GPUS[card])
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(milliseconds, rel=0.005)


def test_the_floor_of_4_bit_is_lower_than_planned_because_the_rest_is_multiplied_in_fp8():
    """The plan's 3.97 ms are of 4.25 bits everywhere, multiplied in bfloat16; the recipe has FP8 beside the experts."""
    four = dataclasses.replace(
        RECIPES["bf16"], roles=dict(RECIPES["bf16"].roles) | dict.fromkeys(("experts", "attention", "mlp"), grouped("mxfp4"))
    )
    load = Load(published(), four, gpu_floor.HEADS["fp8"])
    assert sum(floors(load, GPUS["H200"]).values()) == pytest.approx(3.97, abs=0.02)
    assert sum(floors(load_of(published(), "4bit", "fp8"), GPUS["H200"]).values()) == pytest.approx(3.70, abs=0.01)


def test_bytes_and_operations_of_a_step():
    found = costs(load_of(published(), "fp8", "bf16"))
    assert sum(cost.nbytes for cost in found.values()) == pytest.approx(27.72e9, rel=0.003)
    assert sum(cost.bf16 + cost.fp8 for cost in found.values()) == pytest.approx(2.53e12, rel=0.01)
    assert found["attention"].nbytes == 25 * 1023 * 2 * 8 * 256 * 2 + 5 * 1024 * 2 * 2 * 512 * 2
    longer = costs(load_of(published(), "fp8", "bf16", prompt=131_072))["attention"]
    assert longer.bf16 == pytest.approx(5.6e12, rel=0.02)
    many = costs(load_of(published(), "fp8", "bf16", batch=16))
    assert many["experts"].nbytes == pytest.approx(found["experts"].nbytes) and many["experts"].fp8 > 3 * found["experts"].fp8


def test_without_fp8_units_codes_are_multiplied_in_bfloat16():
    load = load_of(published(), "fp8", "bf16", batch=16)
    one, other = (floors(load, GPUS[name])["linears"] for name in ("A100 80GB", "H100 SXM"))
    assert one == pytest.approx(1000 * 16 * 0.843e12 / 312e12, rel=0.02) and other < one / 5


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(name: str, row: str | None):
    assert gpu_floor.gpu_named(name) == row


# ---- weights


@pytest.mark.parametrize("precision", gpu_floor.PRECISIONS)
def test_weights_are_those_of_a_checkpoint_in_layout_and_size(config: ModelConfig, precision: str):
    weights = random_weights(config, precision, CPU)
    assert weights.nbytes == expected_bytes(config, precision)
    layer = weights.layers[0]
    for weight, width in ((layer.experts.gate_up_proj, 64), (layer.experts.down_proj, 32), (layer.self_attn.o_proj, 64)):
        if precision != "bf16":
            parts = weight.encoding.parts(weight.shape)
            for name, (shape, dtype) in parts.items():
                assert tuple(weight.parts[name].shape) == shape, name
                assert weight.parts[name].dtype == TORCH[str(dtype)], name
            arrays = {name: as_array(part, parts[name][1]) for name, part in weight.parts.items()}
            decoded = Encoded(weight.encoding, weight.shape, arrays).decode()
            np.testing.assert_array_equal(decoded, weight.dense(torch.float32).numpy())
        values = weight.dense(torch.float32)
        assert values.isfinite().all() and values.std().item() == pytest.approx(width**-0.5, rel=0.15)


TORCH = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint32": torch.uint32,
    "uint8": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def as_array(part: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    return part.contiguous().view(torch.uint8).numpy().view(dtype).reshape(part.shape)


def test_which_products_are_in_fp8(config: ModelConfig):
    def taken(precision: str, **options: bool) -> list[bool]:
        layer = random_weights(config, precision, CPU, **options).layers[0]
        pair = (layer.experts.gate_up_proj, layer.mlp.gate_up_proj, layer.router.proj)
        return [getattr(weight, "fp8_activations", False) for weight in pair]

    assert taken("fp8") == [True, True, False]
    assert taken("4bit") == [False, True, False]
    assert taken("fp8", fp8=False) == [False] * 3


def test_the_published_model_has_the_sizes_of_its_checkpoints():
    sizes = [expected_bytes(published(), precision) / 1e9 for precision in ("bf16", "fp8", "4bit")]
    assert sizes == pytest.approx([50.5, 26.05, 16.09], abs=0.01)


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
    with pytest.raises(AssertionError, match="'encode': 1.*'encode': 4"):
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


# ---- a whole run


def test_every_figure_of_a_run(stage: Stage, tmp_path: Path):
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


# ---- results


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
