"""Which kernels run where: decided from data, said in words, and turned on only where something has shown they work."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_backend
from cuda_backend.kernels import build, choice, jit, norm, paths
from cuda_backend.kernels.cards import ALIKE, CARDS, card_for
from cuda_backend.kernels.check import check_graph, close, kernel_of, self_check
from cuda_backend.kernels.choice import INTERPRETER, KERNELS, Choice, Gpu, choose_kernels, why_not
from cuda_backend.kernels.ops import Ops, plain
from cuda_backend.kernels.quantize import Fp8Rows, quantize_ops
from cuda_backend.linear import Dense, Quantized, Stack, linear
from cuda_backend.model import TorchModel
from mlx_diffgemma.backend import LoadOptions
from mlx_diffgemma.errors import BackendError, OptionError
from mlx_diffgemma.formats import open_checkpoint
from mlx_diffgemma.formats.encoding import Encoding, grouped
from tests.backends.tape import record as tape
from tests.conftest import load_model
from tests.formats.foreign import foreign
from tests.tiny import FULL, SLIDING, checkpoint

ROOT = Path(__file__).parents[2]
HOPPER, OLD, SPARK = Gpu("H100", 90, CARDS[90]), Gpu("A100", 80, CARDS[80]), Gpu("GB10", 121, CARDS[120])
UNKNOWN = Gpu("RTX 3090", 86, None)
EVERY = Choice("fused", HOPPER, dict.fromkeys(KERNELS, ""), {})
TWO_LAYERS = (("num_hidden_layers", 2), ("layer_types", (SLIDING, FULL)))


def row(kernel: str = "norm", **changed: object) -> dict[str, object]:
    return {"kernel": kernel, "sm": 90, "dtype": "bfloat16", **choice.versions()} | changed


# ---- the decision


@pytest.mark.parametrize(
    ("requested", "gpu", "reason"),
    [
        ("ops", HOPPER, "as asked"),
        ("auto", None, "no GPU"),
        ("auto", HOPPER, "available, unproven here"),
        ("auto", UNKNOWN, "none for sm_86, only for sm_80, sm_89, sm_90, sm_100, sm_103, sm_120, sm_121"),
        ("fused", HOPPER, ""),
        ("fused", INTERPRETER, ""),
    ],
)
def test_why_not(requested, gpu, reason):
    assert why_not("norm", requested, gpu, "bfloat16", []) == reason


def test_a_row_turns_a_kernel_on_and_only_that_one():
    proven = [row("norm"), row("soft", dtype="float32")]
    assert why_not("norm", "auto", HOPPER, "bfloat16", proven) == ""
    assert why_not("soft", "auto", HOPPER, "float32", proven) == ""
    for kernel, dtype in (("soft", "bfloat16"), ("norm", "float32"), ("look", "bfloat16")):
        assert "unproven" in why_not(kernel, "auto", HOPPER, dtype, proven)


@pytest.mark.parametrize("changed", [{"sm": 100}, {"torch": "2.0"}, {"triton": "9.9"}, {"dtype": "float32"}], ids=str)
def test_a_row_of_elsewhere_proves_nothing_here(changed):
    assert "unproven" in why_not("norm", "auto", HOPPER, "bfloat16", [row(**changed)])


def test_alike_cards_share_a_row_of_the_table_but_no_proof():
    assert card_for(121) is CARDS[120] and card_for(103) is CARDS[100] and card_for(86) is None
    assert not {*ALIKE} & {*CARDS}
    assert why_not("norm", "fused", SPARK, "bfloat16", []) == ""
    assert "unproven" in why_not("norm", "auto", SPARK, "bfloat16", [row(sm=120)])
    assert why_not("norm", "auto", SPARK, "bfloat16", [row(sm=121)]) == ""


def test_nothing_is_proven_that_was_not_run():
    """The file in the repository: rows come from ``make gpu`` alone, and each names its card and day."""
    for found in choice.proven_rows():
        assert {*found} == {"kernel", "sm", "dtype", "torch", "triton", "card", "date"} and found["kernel"] in KERNELS


def test_what_is_asked_for_by_name_is_had_or_refused(monkeypatch):
    fused = LoadOptions(kernels="fused")
    choice.check(fused, HOPPER)
    choice.check(LoadOptions(), UNKNOWN)
    with pytest.raises(OptionError, match="CUDA GPU"):
        choice.check(fused, None)
    with pytest.raises(BackendError, match=r"sm_86.*sm_80, sm_89.*kernels='ops'"):
        choice.check(fused, UNKNOWN)
    for options in (LoadOptions(head="fp8"), LoadOptions(activations="fp8")):
        choice.check(options, HOPPER)
        choice.check(options, None)
        with pytest.raises(OptionError, match=r"='fp8': A100 \(sm_80\) has no FP8"):
            choice.check(options, OLD)
    monkeypatch.setattr(jit, "AVAILABLE", False)
    with pytest.raises(BackendError, match="pip install triton"):
        choice.check(fused, HOPPER)
    assert why_not("norm", "auto", HOPPER, "bfloat16", [row()]) == "Triton is not installed"


def weights_of(kind: str, fp8: bool = False):
    from tests.formats.quantized import quantized  # which takes MLX, and a machine with a GPU may have none

    folder = {"dense": lambda: checkpoint(seed=1), "ct": lambda: foreign("ct-fp8")}.get(kind, lambda: quantized(kind))()
    return cuda_backend.read_weights(open_checkpoint(folder), torch.device("cpu"), torch.bfloat16, fp8=fp8)


def test_only_what_the_weights_need_is_mentioned():
    def names(kind: str, fp8: bool = False) -> set[str]:
        return {*choose_kernels(HOPPER, "fused", torch.bfloat16, weights_of(kind, fp8), []).fused}

    never = {"quantize", "fp8_linear", "packed_linear"}
    assert names("dense") == {*KERNELS} - never
    assert names("affine4") == names("ct") == {*KERNELS} - never | {"packed_linear"}
    assert names("ct", fp8=True) == {*KERNELS} - {"packed_linear"}


def test_encodings_without_a_kernel_are_named():
    mixed = choose_kernels(HOPPER, "fused", torch.bfloat16, weights_of("mixed"), [])
    assert not mixed.on("experts") and "6 bits" in mixed.reasons["experts"] and mixed.on("packed_linear")
    unproven = choose_kernels(HOPPER, "auto", torch.bfloat16, weights_of("mixed"), [])
    assert unproven.reasons["experts"] == mixed.reasons["experts"] and "unproven" in unproven.reasons["norm"]
    low = choose_kernels(HOPPER, "fused", torch.bfloat16, weights_of("affine3"), [])
    assert low.on("packed_linear") and "3 bits" in low.exceptions["packed_linear"]
    described = low.describe()
    assert described["except"] == low.exceptions and "experts" not in described["fused"]
    assert json.loads(json.dumps(described)) == described


def test_description_groups_by_reason():
    proven = [row("norm"), row("experts"), row("graph")]
    some = choose_kernels(HOPPER, "auto", torch.bfloat16, weights_of("dense"), proven)
    assert some.describe()["mode"] == "auto" and some.describe()["fused"] == ["norm", "experts", "graph"]
    assert {*some.describe()["ops"]} == {"available, unproven here"}
    fewer = choose_kernels(HOPPER, "auto", torch.bfloat16, weights_of("dense"), [row("norm"), row("graph")])
    assert fewer.fused == ["norm"] and fewer.reasons["graph"].startswith("needs the kernel of the experts")
    none = choose_kernels(None, "auto", torch.bfloat16, weights_of("dense"), [])
    assert none.describe()["fused"] == [] and {*none.describe()["ops"]} == {"no GPU"}


# ---- paths


def test_the_readme_has_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(paths.table()) in text, "\n".join(["", *paths.table()])


def test_paths_follow_the_cards():
    for card in CARDS.values():
        found = paths.paths(card)
        assert [*found] == [kind.replace("`", "") for kind in paths.KINDS]
        activations = next(path for kind, path in found.items() if "activations" in kind)
        assert ("refused" in activations) == (not card.fp8)
        assert found["FP8 in blocks"] == "plain" and found["bfloat16"] == "cuBLAS / Triton"


# ---- the table of operations


def test_operations_are_bound_where_they_are_chosen():
    some = Choice("auto", HOPPER, {"norm": "", "experts": "", "geglu": "unproven"}, {})
    ops, ordinary = build.build_ops(some, torch.bfloat16), plain(torch.bfloat16)
    assert ops.norm.func is norm.norm_kernel and ops.norm.keywords == {"card": CARDS[90]}
    assert ops.experts.func is build.experts and ops.geglu is ordinary.geglu and ops.look is ordinary.look
    assert ops.linear.func is linear
    assert build.build_ops(Choice("ops", None, {"norm": "as asked"}, {}), torch.bfloat16).norm is ordinary.norm
    every = build.build_ops(EVERY, torch.bfloat16)
    assert all(getattr(every, f.name) is not getattr(ordinary, f.name) for f in dataclasses.fields(Ops))


def test_every_weight_finds_its_product(monkeypatch):
    """Recorded, not computed: this is about who is asked."""
    asked = []

    def told(name):
        return lambda x, *rest: asked.append(name) or torch.zeros(len(x.codes if isinstance(x, Fp8Rows) else x), 16)

    for name in ("fp8_linear", "packed_linear_kernel", "linear"):
        monkeypatch.setattr(build, name, told(name))
    fp8, three = Encoding("fp8", "bfloat16", 8), grouped("affine", bits=3, group_size=64)
    packed = Quantized(grouped("nvfp4"), (16, 64), {})
    eight = Quantized(fp8, (16, 64), {"weight": torch.zeros(16), "scales": torch.zeros(16)}, fp8_activations=True)
    x, few, many = quantize_ops(torch.zeros(3, 64)), torch.zeros(3, 64), torch.zeros(build.MANY, 64)
    on = functools.partial(build.product, dtype=torch.float32, card=CARDS[90])

    def who(x, weight, **flags):
        asked.clear()
        on(x, weight, **({"fp8": True, "packed": True} | flags))
        return asked

    assert who(few, Dense(torch.zeros(16, 64))) == ["linear"]
    assert who(x, eight) == ["fp8_linear"] and who(x, eight, fp8=False) == ["linear"]
    assert who(few, packed) == ["packed_linear_kernel"] and who(few, packed, packed=False) == ["linear"]
    assert who(many, packed) == ["linear"], "unpacked once for so many rows"
    assert who(few, Quantized(three, (16, 64), {})) == ["linear"], "3 bits have no kernel"
    stack = Stack((packed, Dense(torch.zeros(16, 64)), dataclasses.replace(eight, fp8_activations=False)))
    assert who(few, stack) == ["packed_linear_kernel", "linear", "packed_linear_kernel"]


def test_experts_without_a_kernel_are_plain(monkeypatch):
    asked = []
    for name in ("experts_ops", "experts_kernel"):
        monkeypatch.setattr(build, name, lambda *_, name=name: asked.append(name))
    good, bad = (
        Quantized(grouped("nvfp4"), (2, 16, 64), {}),
        Quantized(grouped("affine", bits=3, group_size=64), (2,), {}),
    )
    for pair in ((good, good), (good, bad), (bad, good)):
        build.experts(torch.zeros(1), None, *pair, torch.float32, card=CARDS[90])
    assert asked == ["experts_kernel", "experts_ops", "experts_ops"]


def test_the_head_in_fp8_reaches_both_passes():
    table = quantize_ops(torch.randn(8, 4))
    ops = build.with_head(plain(torch.float32), table)
    assert ops.look.keywords["table_fp8"] is ops.soft.keywords["table_fp8"] is table
    bound = build.with_head(build.build_ops(EVERY, torch.float32), table).look
    assert {*bound.keywords} == {"card", "table_fp8"}


# ---- the self-check: plain operations stand for kernels, right or broken


def fake(choice: Choice, broken: str = "") -> Ops:
    """Plain operations as if they were kernels; one of them is slightly wrong."""
    ordinary = plain(torch.float32)

    def wrong(operation, name):
        def run(*args, **named):
            result = operation(*args, **named)
            return spoiled(result) if kernel_of(name, args) == broken else result

        return run

    return Ops(**{f.name: wrong(getattr(ordinary, f.name), f.name) for f in dataclasses.fields(Ops)})


def spoiled(result):
    """The first number of the first tensor is off, as where an edge is missed."""
    if isinstance(result, Fp8Rows):
        return Fp8Rows(result.codes, result.scales * torch.tensor(1.01))
    if isinstance(result, torch.Tensor):
        result = result.clone()
        result.flatten()[0] += result.abs().max() if result.dtype.is_floating_point else 1
        return result
    if isinstance(result, tuple):
        return (spoiled(result[0]), *result[1:])
    first = dataclasses.fields(result)[0].name
    return dataclasses.replace(result, **{first: spoiled(getattr(result, first))})


@functools.cache
def small(kind: str):
    """A model whose weights use every product: (config, weights) in float32."""
    folder = {"fp8": lambda: foreign("ct-mixed"), "dense": lambda: checkpoint(seed=1)}[kind]()
    opened = open_checkpoint(folder)
    weights = cuda_backend.read_weights(opened, torch.device("cpu"), torch.float32, fp8=True)
    return opened.config, weights


CHECKED = [kernel for kernel in KERNELS if kernel not in ("graph", "packed_linear")]


@pytest.mark.parametrize("broken", ["", *CHECKED])
def test_a_broken_kernel_is_caught_and_named(broken):
    config, weights = small("fp8")
    chosen = choose_kernels(HOPPER, "fused", torch.float32, weights, [])
    ops = fake(chosen, broken)
    if not broken:
        return self_check(chosen, ops, plain(torch.float32), config, weights)
    if broken == "look":
        ops = dataclasses.replace(ops, look=flat(ops.look))
    with pytest.raises(BackendError, match=rf"kernel '{broken}'.*H100.*kernels='ops'"):
        self_check(chosen, ops, plain(torch.float32), config, weights)


def flat(look):
    """Finds other ids: the first field of ``Seen`` is whole numbers, of which a few may differ."""

    def run(*args, **named):
        seen = look(*args, **named)
        return dataclasses.replace(seen, argmax=(seen.argmax + 7) % 512)

    return run


def test_kernels_that_are_off_are_not_asked():
    config, weights = small("dense")
    chosen = choose_kernels(HOPPER, "auto", torch.float32, weights, [row("norm", dtype="float32")])
    self_check(chosen, fake(chosen, "experts"), plain(torch.float32), config, weights)
    with pytest.raises(BackendError, match="norm"):
        self_check(chosen, fake(chosen, "norm"), plain(torch.float32), config, weights)


def test_one_number_of_many_is_seen():
    """A missed edge hardly moves a mean over a million numbers."""
    truth = torch.randn(1000, 1000)
    found = truth.clone()
    found[-1, -1] += truth.abs().max()
    for dtype in (torch.float32, torch.bfloat16):
        assert close(truth, truth, dtype) and not close(found, truth, dtype)
    assert not close(truth.bfloat16(), truth, torch.float32) and not close(truth[:1], truth, torch.float32)


def test_nan_is_a_difference():
    config, weights = small("dense")
    chosen = choose_kernels(HOPPER, "fused", torch.float32, weights, [])
    ops = plain(torch.float32)
    spoilt = dataclasses.replace(ops, geglu=lambda mixed, fp8: ops.geglu(mixed, fp8) * torch.nan)
    with pytest.raises(BackendError, match="geglu"):
        self_check(chosen, spoilt, ops, config, weights)


def test_a_graph_that_freezes_is_caught():
    model = load_model(checkpoint(seed=1), "cpu", "float32")
    whole = TorchModel(model.config, model.network.weights, model.device, model.dtype, model.network.ops, tape)
    check_graph(whole, tape)

    def frozen(run):
        run()
        return lambda: None

    with pytest.raises(BackendError, match="graph"):
        check_graph(whole, frozen)


# ---- in the interpreter, and without Triton


@pytest.mark.parametrize("kind", ["dense", "fp8"])
def test_kernels_pass_the_self_check_interpreted(kind):
    """Slow, up to a minute: a prompt and two steps of two layers, on every kernel; in FP8 with an FP8 head."""
    fp8, dtype = kind == "fp8", torch.bfloat16 if kind == "fp8" else torch.float32
    opened = open_checkpoint(foreign("ct-mixed") if fp8 else checkpoint(seed=1, shape=TWO_LAYERS))
    weights = cuda_backend.read_weights(opened, torch.device("cpu"), dtype, fp8=True)
    head = quantize_ops(weights.embed_tokens) if fp8 else None
    chosen = choose_kernels(INTERPRETER, "fused", dtype, weights, [])
    assert "graph" not in chosen.fused and chosen.describe()["interpreted"]
    assert {"look", "soft", "experts"} <= {*chosen.fused} and chosen.on("fp8_linear") == fp8
    pair = [build.with_head(ops, head) for ops in (build.build_ops(chosen, dtype), plain(dtype))]
    self_check(chosen, *pair, opened.config, weights)


WITHOUT = """
import sys
sys.modules["triton"] = None
import mlx_diffgemma as m
from cuda_backend.kernels import jit
assert not jit.AVAILABLE
model, processor = m.load("demo", backend="cpu")
print(m.generate(model, processor, "12+34=", seed=7).text)
try:
    m.load("demo", backend="cpu", kernels="fused")
except ValueError as error:
    print(error)
"""


def test_plain_operations_need_no_triton():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[0] == "46" and "kernels" in run.stdout.splitlines()[1]
