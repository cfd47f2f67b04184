"""Which kernels run on MLX: decided from data, said in words, and only where something has shown that they work."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_diffgemma
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.mlx_backend.kernels import chip as chip_module
from mlx_diffgemma.mlx_backend.kernels import choice
from mlx_diffgemma.mlx_backend.kernels.attention import Visible
from mlx_diffgemma.mlx_backend.kernels.attention_rule import RULES, kernel_wins
from mlx_diffgemma.mlx_backend.kernels.check import BOUNDS, alike, as_many, close, self_check
from mlx_diffgemma.mlx_backend.kernels.chip import EMULATED, Chip, chip_here
from mlx_diffgemma.mlx_backend.kernels.choice import Choice, build_ops, choose_kernels, why_not
from mlx_diffgemma.mlx_backend.kernels.head import Seen
from mlx_diffgemma.mlx_backend.kernels.launch import running_on
from mlx_diffgemma.mlx_backend.kernels.norm import AfterAttention, AfterExperts
from mlx_diffgemma.mlx_backend.kernels.ops import FUSED, KERNELS, PLAIN, Ops
from mlx_diffgemma.mlx_backend.linear import Dense
from tests.metal_cpu.runner import emulate
from tests.metal_kernels.harness import random

MAX, BASE = Chip("Apple M4 Max", "applegpu_g16s"), Chip("Apple M4", "applegpu_g16g")
VIRTUAL = Chip("Apple Paravirtual device", "air64_v27")
ALWAYS = [kernel for kernel in KERNELS if kernel != "survivors"]  # which only one kind of self-conditioning needs
EVERY = Choice("fused", MAX, dict.fromkeys(KERNELS, ""), {})
PACKAGE = Path(mlx_diffgemma.__file__).parent
REAL = ModelConfig.from_dict(
    read_json(PACKAGE / "fixtures" / "diffusiongemma-26B-A4B-it.json")
).text  # heads of 256, 512
DEMO = ModelConfig.from_dict(read_json(PACKAGE / "demo_checkpoint" / "config.json")).text  # and of 32 and 64
TABLE = Dense(mx.zeros((8, 4)))


def row(kernel: str = "look", **changed: object) -> dict[str, object]:
    return {"kernel": kernel, "chip": MAX.name, "dtype": "bfloat16", **choice.versions()} | changed


@pytest.fixture
def on(monkeypatch):
    """``on(chip)(requested, ...)``: the choice for a model in bfloat16 on that chip."""

    def there(chip: Chip | None):
        monkeypatch.setattr(choice, "chip_here", lambda: chip)

        def choose(requested: str, config=REAL, table=TABLE, **named) -> Choice:
            return choose_kernels(requested, mx.bfloat16, config, table, **{"proven": [], **named})

        return choose

    return there


# ---- where this is


def test_a_cpu_is_no_chip():
    assert chip_here() is None
    with running_on(emulate):
        assert chip_here() is EMULATED


def test_a_chip_is_what_mlx_says(monkeypatch):
    about = {"device_name": "Apple M4 Max", "architecture": "applegpu_g16s", "memory_size": 1}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: about)
    assert chip_here() is None, "MLX's default device is the CPU"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert chip_here() == MAX and not MAX.virtual
    about["device_name"] = VIRTUAL.name
    assert chip_here().virtual
    with running_on(emulate):
        assert chip_module.chip_here() is EMULATED and not EMULATED.virtual


# ---- the decision


@pytest.mark.parametrize(
    ("requested", "chip", "reason"),
    [
        ("ops", MAX, "as asked"),
        ("ops", None, "as asked"),
        ("auto", None, "no Metal GPU"),
        ("auto", MAX, "available, unproven here"),
        ("auto", EMULATED, "available, unproven here"),
        ("auto", VIRTUAL, "available, unproven here"),
        ("fused", MAX, ""),
        ("fused", VIRTUAL, ""),
        ("fused", EMULATED, ""),
    ],
)
def test_why_not(requested, chip, reason):
    assert why_not("look", requested, chip, "bfloat16", []) == reason


def test_without_proof_auto_is_plain_mlx(on):
    found = on(MAX)("auto")
    assert found.fused == [] and build_ops(found) == PLAIN
    assert found.describe() == {"mode": "auto", "fused": [], "ops": {"available, unproven here": ALWAYS}}


def test_a_row_turns_a_kernel_on_and_only_that_one(on):
    found = on(MAX)("auto", proven=[row("look"), row("odds", dtype="float32")])
    assert found.fused == ["look"] and found.on("look") and not found.on("odds")
    ops = build_ops(found)
    assert ops.look is FUSED.look and dataclasses.replace(ops, look=PLAIN.look) == PLAIN
    assert found.describe()["ops"]["available, unproven here"] == [kernel for kernel in ALWAYS if kernel != "look"]
    assert json.loads(json.dumps(found.describe())) == found.describe()


@pytest.mark.parametrize(
    "changed", [{"chip": "Apple M4 Pro"}, {"mlx": "0.33"}, {"dtype": "float16"}, {"kernel": "odds"}], ids=str
)
def test_a_row_of_elsewhere_proves_nothing_here(on, changed):
    assert not on(MAX)("auto", proven=[row(**changed)]).on("look")


def test_a_row_counts_for_every_patch_of_mlx():
    assert choice.versions() == {"mlx": "0.32"}


def test_what_is_asked_for_by_name_is_had_or_refused(on):
    assert on(MAX)("fused").fused == ALWAYS and build_ops(on(MAX)("fused")).look is FUSED.look
    assert on(MAX)("ops").describe() == {"mode": "ops", "fused": [], "ops": {"as asked": ALWAYS}}
    assert on(None)("auto").describe()["ops"] == {"no Metal GPU": ALWAYS}
    with pytest.raises(
        OptionError, match=r"^kernels='fused': kernels need a Mac's GPU; leave it out, or use kernels='ops'$"
    ):
        on(None)("fused")
    choice.check("auto")
    choice.check("ops")
    with pytest.raises(OptionError, match="Mac's GPU"):
        choice.check("fused")


def test_emulated_kernels_are_called_so():
    with running_on(emulate):
        found = choose_kernels("fused", mx.float32, DEMO, TABLE, proven=[])
    assert found.chip is EMULATED and found.describe() == {"mode": "fused", "fused": ALWAYS, "emulated": True}


def test_a_virtual_machine_has_no_matrices(on):
    found = on(VIRTUAL)("fused")
    assert found.fused == [kernel for kernel in ALWAYS if kernel != "canvas_attention"]
    assert "simdgroup_matrix" in found.reasons["canvas_attention"]


def test_survivors_are_mentioned_where_they_are_of_use(on, monkeypatch):
    assert "survivors" not in on(MAX)("fused").reasons
    monkeypatch.setattr(choice, "gathers", lambda table: "" if table is TABLE else "3 bits")
    assert on(MAX)("fused", self_conditioning="survivors").on("survivors")
    assert on(MAX)("auto", self_conditioning="survivors", proven=[row("survivors")]).fused == ["survivors"]
    other = Dense(mx.zeros((8, 4)))
    for requested in ("auto", "fused"):
        found = on(MAX)(requested, table=other, self_conditioning="survivors")
        assert found.reasons["survivors"] == "not for 3 bits"
    assert on(MAX)("ops", table=other, self_conditioning="survivors").reasons["survivors"] == "as asked"


# ---- attention, by the rule


def test_auto_takes_attention_where_the_rule_does(on):
    proven = [row("canvas_attention", chip=chip.name) for chip in (MAX, BASE)]
    large, small = (on(chip)("auto", proven=proven) for chip in (MAX, BASE))
    assert RULES[256, "pro-max"].least is None and RULES[512, "pro-max"].least and RULES[256, "base"].least
    assert large.fused == small.fused == ["canvas_attention"]
    tokens = {key: rule.least for key, rule in RULES.items()}
    assert large.describe()["except"] == {
        "canvas_attention": f"not for heads of 256; heads of 512 from {tokens[512, 'pro-max']} tokens on"
    }
    assert small.exceptions["canvas_attention"] == (
        f"heads of 256 from {tokens[256, 'base']} tokens on; heads of 512 from {tokens[512, 'base']} tokens on"
    )
    demo = on(MAX)("auto", config=DEMO, proven=proven)
    assert not demo.fused and "as fast" in demo.reasons["canvas_attention"], "no rule is about such heads"
    assert on(MAX)("fused", config=DEMO).on("canvas_attention") and not on(MAX)("fused").exceptions


def test_the_rule_is_asked_for_every_shape(on, monkeypatch):
    asked = []
    for name in ("ops", "kernel"):
        monkeypatch.setattr(choice, f"canvas_attention_{name}", lambda *_, name=name: asked.append(name))
    attention = build_ops(on(BASE)("auto", proven=[row("canvas_attention", chip=BASE.name)])).canvas_attention
    least = RULES[256, "base"].least
    for extent in (least - 1, least):
        q = mx.zeros((1, 1, 1, 256))
        attention(q, k=q, v=q, prefix_k=q, prefix_v=q, visible=Visible(extent, mx.array([extent]), True))
        assert kernel_wins(256, extent, BASE.architecture) == (asked[-1] == "kernel")
    assert asked == ["ops", "kernel"]
    assert build_ops(on(BASE)("fused")).canvas_attention is FUSED.canvas_attention


# ---- the self-check: plain operations stand for kernels, right or broken

C, D, V, DIM = 6, 16, 128, 16


def step(dtype: mx.Dtype):
    """Every operation once, on numbers as a step has them."""
    draw = functools.partial(random, dtype=dtype)
    flat = functools.partial(random, dtype=mx.float32)

    def run(ops: Ops) -> None:
        vectors = [flat(i, D) for i in range(3)]
        parts = ops.after_attention(draw(1, 1, C, D), draw(2, 1, C, D), AfterAttention(*vectors, draw(3, D)), 1e-6)
        mixed = draw(4, 1, C, D), draw(5, 1, C, D)
        ops.after_experts(parts.stream, *mixed, AfterExperts(*vectors), mx.array([0.5], dtype), 1e-6, flat(6, D))
        cos, sin = draw(7, 1, 1, C, DIM // 2), draw(8, 1, 1, C, DIM // 2)
        raw = [draw(9, 1, C, 4 * DIM), draw(10, 1, C, 2 * DIM), draw(11, 1, C, 2 * DIM)]
        q, k, v = ops.heads(*raw, flat(12, DIM), flat(13, DIM), cos, sin, 1e-6)
        ops.heads(None, raw[1], None, flat(12, DIM), flat(13, DIM), cos, sin, 1e-6)
        past = draw(14, 1, 2, 12, DIM)
        ops.canvas_attention(q / 4, k, v, prefix_k=past, prefix_v=past, visible=Visible(9, mx.array([9]), True))
        ops.geglu(draw(15, C, 2 * D))
        routes = ops.route(draw(16, C, 8), mx.ones(8), 2)
        ops.gather_sum(draw(17, 2 * C, D), routes, dtype)
        shape = {"temperature": mx.full(C, 0.7), "bias": None}
        logits = draw(18, C, V, scale=4)
        seen = ops.look(logits, 30.0, uniform=mx.linspace(0.1, 0.9, C), keep=V, **shape)
        ops.odds(logits, 30.0, seen=seen, **shape)
        skip = mx.arange(C) == 2
        ops.survivors(logits, 30.0, seen=seen, table=Dense(draw(19, V, D)), skip=skip, **shape)

    return run


def plain(**changed) -> Ops:
    return dataclasses.replace(PLAIN, **changed)


def spoiled(result):
    """The first number of the first array is off, as where an edge is missed."""
    if isinstance(result, mx.array):
        first = mx.arange(result.size).reshape(result.shape) == 0
        if not mx.issubdtype(result.dtype, mx.floating):
            return mx.where(first, result + 1, result).astype(result.dtype)
        return mx.where(first, result + mx.abs(result).max(), result).astype(result.dtype)
    if isinstance(result, tuple):
        return (*result[:-1], spoiled(result[-1]))
    name = dataclasses.fields(result)[0].name
    return dataclasses.replace(result, **{name: spoiled(getattr(result, name))})


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_plain_operations_pass_their_own_check(dtype):
    self_check(EVERY, dtype, step(dtype), PLAIN)


@pytest.mark.parametrize("broken", [kernel for kernel in KERNELS if kernel != "look"])
def test_a_broken_kernel_is_caught_and_named(broken):
    wrong = plain(**{broken: lambda *args, **named: spoiled(getattr(PLAIN, broken)(*args, **named))})
    with pytest.raises(
        BackendError, match=rf"^kernel '{broken}' .*Apple M4 Max: load with kernels='ops', and please rep"
    ):
        self_check(EVERY, mx.float32, step(mx.float32), wrong)
    rest = dataclasses.replace(EVERY, reasons={**EVERY.reasons, broken: "unproven"})
    self_check(rest, mx.float32, step(mx.float32), wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda seen: {"argmax": (seen.argmax + 7) % V},
        lambda seen: {"drawn": mx.zeros_like(seen.drawn)},
        lambda seen: {"entropy": spoiled(seen.entropy)},
        lambda seen: {"confidence": seen.confidence * mx.nan},
        lambda seen: {"greatest": seen.greatest + 1},
        lambda seen: {"total": seen.total * 2},
        lambda seen: {"count": seen.count + 5},
        lambda seen: {"ids": mx.roll(seen.ids, 1, -1)},
        lambda seen: {"ids": None, "count": None},
    ],
)
def test_what_look_sees_is_checked_field_by_field(change):
    def look(*args, **named):
        seen = PLAIN.look(*args, **named)
        return dataclasses.replace(seen, **change(seen))

    with pytest.raises(BackendError, match="look"):
        self_check(EVERY, mx.float32, step(mx.float32), plain(look=look))


def test_a_rounding_that_takes_the_next_number_is_no_mistake():
    """``greatest`` one number of bfloat16 higher, and ``total`` with it; one row in ten drawn or counted otherwise."""
    logits = random(1, 20, V, dtype=mx.bfloat16, scale=4)
    few = mx.arange(20) < 2
    truth = PLAIN.look(logits, None, temperature=mx.ones(20), uniform=mx.full(20, 0.5), keep=V)
    higher = mx.where(few, 2**-6, 0.0)
    other = {"greatest": truth.greatest + higher, "total": truth.total * mx.exp(-higher)}
    other |= {"drawn": mx.where(few, 0, truth.drawn), "count": mx.where(few, truth.count + 3, truth.count)}
    found = dataclasses.replace(truth, **other, ids=mx.where(few[:, None], -1, truth.ids))
    assert alike(found, truth, logits, mx.bfloat16) and as_many(found, truth)
    worse = mx.where(mx.arange(20) < 3, truth.count + 3, truth.count)
    assert not as_many(dataclasses.replace(truth, count=worse), truth)


def test_a_kernel_that_metal_refuses_is_named():
    def refused(*args):
        raise RuntimeError("[metal::Device] Unable to build metal library\nand 40 lines")

    with pytest.raises(
        BackendError, match=r"^kernel 'geglu' does not run \(\[metal::Device\] Unable to build metal libr"
    ) as said:
        self_check(EVERY, mx.float32, step(mx.float32), plain(geglu=refused))
    assert "\n" not in str(said.value)


def test_a_kernel_that_was_never_called_was_not_checked():
    with pytest.raises(AssertionError, match="geglu"):
        self_check(EVERY, mx.float32, lambda ops: step(mx.float32)(dataclasses.replace(ops, geglu=PLAIN.geglu)), PLAIN)


def test_a_model_runs_on_plain_results_while_it_is_checked():
    """Else one wrong kernel would be blamed on those that come after it. And a kernel of ``look`` leaves no weights."""
    given = {}

    def noting(name):
        def operation(*args, **named):
            given[name] = named["seen"]
            return getattr(PLAIN, name)(*args, **named)

        return operation

    close_by = plain(
        look=lambda *args, **named: dataclasses.replace(
            seen := PLAIN.look(*args, **named), entropy=seen.entropy * 1.0001
        ),
        odds=noting("odds"),
    )
    self_check(EVERY, mx.float32, step(mx.float32), close_by)
    assert isinstance(given["odds"], Seen) and given["odds"].weight is None
    run = step(mx.float32)
    own = []
    run(plain(look=lambda *args, **named: own.append(PLAIN.look(*args, **named)) or own[0]))
    assert np.array_equal(np.array(given["odds"].entropy), np.array(own[0].entropy))


def test_one_number_of_many_is_seen():
    """A missed edge hardly moves a mean over a million numbers."""
    truth = random(1, 1000, 1000)
    edge = mx.arange(truth.size).reshape(truth.shape) == truth.size - 1
    for dtype in BOUNDS:
        cast = truth.astype(dtype)
        assert close(cast, cast, dtype)
        assert not close(mx.where(edge, cast + mx.abs(cast).max(), cast), cast, dtype)
        assert not close(mx.where(edge, mx.nan, cast).astype(dtype), cast, dtype)
        assert not close(cast * 1.1, cast, dtype)
    assert not close(mx.ones(4, mx.bfloat16), mx.ones(4), mx.float32), "of another dtype"
    assert not close(truth[:1], truth, mx.float32)
    whole = mx.array([1, 2])
    assert close(whole, whole, mx.float32) and not close(whole, whole + 1, mx.float32)


def test_no_chunk_is_left_out(monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.mlx_backend.kernels.check.CHUNK", 7)
    truth = random(1, 3, 11)
    for place in (0, 6, 7, 32):
        off = mx.where(mx.arange(33).reshape(3, 11) == place, truth + 9, truth)
        assert not close(off, truth, mx.float32)
    assert close(truth, truth, mx.float32)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_kernels_pass_the_self_check_emulated(dtype):
    with running_on(emulate):
        chosen = Choice("fused", EMULATED, dict.fromkeys(KERNELS, ""), {})
        self_check(chosen, dtype, step(dtype))
