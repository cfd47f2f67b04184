"""The work of a step at the sizes of the published model, and what kernels are promised to save of it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import OptionError
from mlx_diffgemma.formats.encoding import dense
from mlx_diffgemma.hub import DEMO
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.tools import chips, plan, work, work_ends, work_layers
from mlx_diffgemma.tools.work import Load
from mlx_diffgemma.tools.work_ends import PARTS, TARGET, costs, total
from tests import tiny
from tests.core.test_memory import QUANTIZED

REAL = ModelConfig.from_dict(read_json(plan.PUBLISHED))
VISION = 2 * 570_000_000  # bytes of the vision tower, about, which published files hold
D, V, C, H = 2816, 262_144, 256, 16


def real(prompt: int, form: str = "4bit", **changed) -> Load:
    return Load(REAL, work.formats(REAL, form), prompt=prompt, **changed)


@pytest.mark.parametrize("prompt", [1024, 4096])
@pytest.mark.parametrize("form", work.FORMATS)
def test_kernels_save_what_was_promised(prompt, form, record):
    """At least 35 % of vocabulary and attention traffic, of the latter alone too; and also if plain slices were as
    large, or if the rule leaves attention to plain operations. If both, it is what it is."""
    load = real(prompt, form)
    plain, fused = costs(load, False), costs(load, True)
    level = costs(dataclasses.replace(load, wide=True), False)
    assert plan.less(plain, fused) >= 0.35
    assert plan.less(level, fused) >= 0.35
    without = fused | {plan.ATTENTION: plain[plan.ATTENTION]}
    assert plan.less(plain, without) >= 0.35 and plan.less(level, without) > 0
    for part in TARGET:
        assert fused[part].nbytes <= plain[part].nbytes
    assert fused["canvas attention"].nbytes <= 0.65 * plain["canvas attention"].nbytes
    shares = {"less": plan.less(plain, fused), "level": plan.less(level, fused), "both": plan.less(level, without)}
    record(format=form, prompt=prompt, **{name: round(share, 3) for name, share in shares.items()})


def test_the_operations_of_a_step():
    """2.5 TFLOP behind 1,024 tokens: products with all dense matrices, eight experts of each layer, and attention."""
    sliding = D * (16 * 256 + 2 * 8 * 256) + 16 * 256 * D
    full = D * (16 * 512 + 2 * 512) + 16 * 512 * D
    common = 3 * 2112 * D + 128 * D + 8 * 3 * 704 * D
    layers = 25 * (sliding + common) + 5 * (full + common)
    once = 3 * 2112 * D + 2 * V * D
    attention = 25 * 4 * H * C * (1023 + C) * 256 + 5 * 4 * H * C * (1024 + C) * 512
    expected = 2 * C * (layers + once) + attention
    assert total(costs(real(1024), False)).operations == expected == pytest.approx(2.53e12, rel=0.01)
    assert total(costs(real(1024), True)).operations == expected, "kernels change no product"


def test_parts_by_hand():
    """With kernels, bfloat16, behind 1,024 tokens: what each reads and writes, from the shapes."""
    fused, logits = costs(real(1024), True), 2 * C * V
    table = D * V * 8.5 / 8
    assert fused["head product"].nbytes == table + 2 * C * D + logits
    assert fused["vocabulary passes"].nbytes == logits
    assert fused["soft embedding"].nbytes == 2 * logits + (table + logits + 2 * C * D) + 2 * 2 * C * D
    queries, sliding, full = C * H * 256, 2 * (1023 + C) * 8 * 256, 2 * (1024 + C) * 2 * 512
    assert fused["canvas attention"].nbytes == 2 * (25 * (2 * queries + sliding) + 5 * (2 * 2 * queries + full))
    assert fused["norms and residuals"].nbytes == 2 * C * D * 11 * 30 + 20 * C * D
    assert fused["un-sort, weigh, sum"].nbytes == 30 * 2 * C * D * (8 + 1)
    bank = 128 * 3 * 704 * D * 4.5 / 8
    moved = 2 * C * 8 * (2 * D + (D + 2 * 704) + 3 * 704 + (704 + D))
    assert fused["experts"].nbytes == pytest.approx(30 * (bank + moved), rel=1e-6)


def test_the_plain_version_reads_the_table_once_for_32_rows():
    plain = costs(real(1024), False)
    table = D * V * 8.5 / 8
    assert real(1024).slices(False) == 8 and real(1024).slices(True) == 1
    assert real(1024, batch=2).slices(True) == 1 and real(1024, batch=3).slices(True) == 2
    assert plain["head product"].nbytes - costs(real(1024), True)["head product"].nbytes == 7 * table
    assert plain["vocabulary passes"].nbytes == C * V * 42


def test_plain_attention_by_hand():
    """12 bytes per score where the kernel has none, beside 7 passes over queries; in full layers of more than 4,096
    keys the softmax reads twice, and what a rounded extent adds is masked and multiplied."""

    def both(prompt: int, layer: int) -> tuple[work.Cost, work.Cost]:
        plain, fused = (work_layers.attention(real(prompt), layer, side) for side in (False, True))
        return plain, fused

    def more(scores: int, dim: int, nbytes: int = 12) -> int:
        return nbytes * C * H * scores + 5 * 2 * C * H * dim

    for prompt, layer, dim, seen, nbytes in ((4096, 0, 256, 1023 + C, 12), (2048, 5, 512, 2048 + C, 12)):
        plain, fused = both(prompt, layer)
        assert plain.nbytes - fused.nbytes == more(seen, dim, nbytes) and plain.operations == fused.operations
    plain, fused = both(4096, 5)
    assert plain.nbytes - fused.nbytes == more(4096 + C, 512, 14)
    plain, fused = both(1500, 5)
    extent, vain = 1536, 36
    keys = 2 * 2 * 2 * 512 * vain
    assert plain.nbytes - fused.nbytes == more(extent + C, 512) + keys + 4 * C * H * extent
    assert plain.operations - fused.operations == 4 * C * H * 512 * vain


def test_survivors_leave_the_dense_product_out():
    load = real(4096, self_conditioning="survivors", survivors=100)
    found = costs(load, True)["soft embedding"]
    assert found.operations == 2 * C * 100 * D
    assert found.nbytes == C * 100 * (4 + 2 + D * 8.5 / 8) + 2 * C * D
    assert costs(load, False)["soft embedding"] == costs(real(4096), False)["soft embedding"], (
        "plain has no such option"
    )
    flat = dataclasses.replace(load, survivors=1e9)
    assert costs(flat, True)["soft embedding"].operations == 2 * C * V * D, "no more survivors than ids"


def test_a_tail_left_out_of_the_head():
    half = costs(real(4096, kept=128), True)
    whole = costs(real(4096), True)
    for part in work_ends.VOCABULARY:
        assert half[part].operations == whole[part].operations / 2
    assert costs(real(4096, kept=999), True) == whole


def test_every_expert_is_read():
    assert work.touched(REAL.text, C) > 1 - 1e-6, "2,048 pairs at 128 experts"
    assert work.touched(REAL.text, 1) == 8 / 128


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("place", ["real", "demo", "tiny"])
def test_no_part_costs_more_with_kernels(place, batch, width):
    config = REAL if place == "real" else ModelConfig.from_folder(DEMO if place == "demo" else tiny.checkpoint())
    load = Load(config, {}, prompt=70, batch=batch, width=width)
    plain, fused = costs(load, False), costs(load, True)
    assert list(plain) == list(fused) == list(PARTS)
    for part in PARTS:
        if part != "canvas attention":  # plain operations also multiply what they mask
            assert fused[part].operations == plain[part].operations, part
        if part != "soft embedding":  # in float32 plain operations have its probabilities at hand
            assert 0 < fused[part].nbytes <= plain[part].nbytes, part
    assert total(fused, work_ends.VOCABULARY).nbytes < total(plain, work_ends.VOCABULARY).nbytes
    assert all(cost.nbytes == int(cost.nbytes) for part, cost in fused.items() if part != "experts")


def test_batches_share_the_weights():
    one, four = costs(real(4096), True), costs(real(4096, batch=4), True)
    for part in PARTS:
        assert one[part].nbytes < four[part].nbytes + 1 and four[part].nbytes <= 4 * one[part].nbytes, part
        assert four[part].operations == pytest.approx(4 * one[part].operations)
    weights = sum(real(1).stored(name, row.shape) for name, row in work.matrices(REAL).items() if "mlp" in name)
    assert 4 * one["dense MLP"].nbytes - four["dense MLP"].nbytes == 3 * weights


def test_the_window_bounds_sliding_layers():
    at = [work_layers.attention(real(prompt), 0, True).nbytes for prompt in (500, 1023, 1024, 100_000)]
    assert at[0] < at[1] == at[2] == at[3]
    grows = work_layers.attention(real(2000), 5, True).nbytes - work_layers.attention(real(1000), 5, True).nbytes
    assert grows == 1000 * 2 * 2 * 512 * 2, "a token of a full layer: k and v of two heads of 512"
    assert (
        work_layers.attention(real(1023), 0, False).operations == work_layers.attention(real(9999), 0, True).operations
    )


def test_what_joining_would_copy():
    expected = 2 * 2 * 2 * (25 * 8 * 256 * (1023 + C) + 5 * 2 * 512 * (4096 + C))
    assert work_ends.joined(real(4096)) == expected


@pytest.mark.parametrize(("form", "name"), [("mxfp4", "mxfp4"), ("8bit", "affine 8-bit")])
def test_formats_are_those_that_are_published(form, name):
    """Weights from the recipe, and what the published files hold, the vision tower in bfloat16 among it."""
    held = sum(plan.memory_plan(real(1, form), True).parts[part] for part in ("weights", "embedding"))
    assert held + VISION == pytest.approx(QUANTIZED[name], rel=0.005)


def test_dense_weights_are_as_wide_as_activations():
    assert work.formats(REAL, "bf16") == {}
    assert real(1, "bf16").stored("any", (10, 10)) == 200 and real(1, "bf16", width=4).stored("any", (10, 10)) == 400
    assert Load(REAL, {"any": dense("float32")}).stored("any", (10, 10)) == 400


# ---- chips


def test_a_floor_is_the_slower_of_reading_and_multiplying():
    m4 = chips.chip("m4-max")
    assert m4.milliseconds(546e9, 0) == pytest.approx(1000)
    assert m4.milliseconds(0, m4.tflops * 1e12) == pytest.approx(1000)
    assert m4.milliseconds(546e6, m4.tflops * 1e9 * 3) == pytest.approx(3)


def test_rates_are_those_that_others_state():
    """float32 rates of the press and of reviews, which on these chips are float16's too; M5: tzakharko's estimate."""
    stated = {"m1": 2.6, "m1-max": 10.4, "m2-ultra": 27.2, "m3-pro": 6.4, "m4": 4.0, "m5-max": 70.0}
    for name, tflops in stated.items():
        assert chips.chip(name).tflops == pytest.approx(tflops, rel=0.03)


def test_larger_chips_are_larger():
    for family in ("m1", "m2", "m3", "m4", "m5"):
        made = [chip for name, chip in chips.CHIPS.items() if name.split("-")[0] == family]
        for small, large in itertools.pairwise(made):
            assert small.bandwidth < large.bandwidth and small.tflops < large.tflops and small.memory < large.memory


@pytest.mark.parametrize("name", ["m4-max", "M4 Max", "Apple M4 Max", "m4_max"])
def test_a_chip_by_any_of_its_names(name):
    assert chips.chip(name).name == "m4-max"


def test_an_unknown_chip_is_refused_by_name():
    with pytest.raises(OptionError, match=r"'m9' is unknown; choose one of m1, m1-pro.*m5-max"):
        chips.chip("m9")


def test_what_a_gpu_may_keep():
    assert chips.wired(24) == pytest.approx(17.18e9, rel=1e-3) and chips.wired(48) == pytest.approx(38.65e9, rel=1e-3)
    assert chips.smallest(16.3e9) == 24 and chips.smallest(17.3e9) == 32 and chips.smallest(1e15) is None
