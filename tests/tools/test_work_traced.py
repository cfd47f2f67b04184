"""The count of the plain version against the graphs that MLX makes of the plain operations: neither more nor less.

At the sizes of the 26B model. Nothing is computed, graphs are enough.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.json_file import read_json
from mlx_diffgemma.mlx_backend import cache, vocabulary
from mlx_diffgemma.mlx_backend.kernels import attention, geglu, head, heads, moe, norm, ops
from mlx_diffgemma.mlx_backend.linear import Dense
from mlx_diffgemma.tools import plan, work, work_ends, work_layers
from mlx_diffgemma.tools.work import Load
from tests.tools.tape import as_on_a_gpu, bytes_of, compiled_passes, passes_of

REAL = ModelConfig.from_dict(read_json(plan.PUBLISHED))
DTYPES = {2: mx.bfloat16, 4: mx.float32}
EPS = 1e-6
PROMPTS = {"as it is": 1024, "rounded up": 1500, "beyond one reading": 4096}
LAYERS = pytest.mark.parametrize("layer", [0, 5], ids=["sliding", "full"])
Case = tuple[Callable[..., list[mx.array]], tuple[mx.array, ...]]


@pytest.fixture(params=DTYPES, ids=["bfloat16", "float32"])
def load(request) -> Load:
    return Load(REAL, {}, prompt=1024, width=request.param)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)


def zeros(load: Load, *shape: int) -> mx.array:
    return mx.zeros(shape, DTYPES[load.width])


def known(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An array that is there before the graph is made, so that making it is no part of that."""
    made = mx.random.uniform(shape=shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(made)
    return made


def same(counted: float, case: Case) -> None:
    traced = bytes_of(case[0], *case[1])
    assert counted == pytest.approx(traced, rel=0.004), f"{counted / traced:.4f} of what the graph moves"


def one(weights: object) -> list[mx.array]:
    return [getattr(weights, f.name) for f in dataclasses.fields(weights)]


def after_attention(load: Load) -> Case:
    wide = load.text.hidden_size
    x, router = zeros(load, 1, load.rows, wide), known(3, wide, dtype=DTYPES[load.width])
    weights = norm.AfterAttention(*(known(seed, wide) for seed in range(3)), router)
    return lambda h, a: one(norm.after_attention_ops(h, a, weights, EPS)), (x, x + 0)


def after_experts(load: Load) -> Case:
    wide = load.text.hidden_size
    x, scalar = zeros(load, 1, load.rows, wide), known(9, 1, dtype=DTYPES[load.width])
    *behind, following = (known(seed, wide) for seed in range(4))
    weights = norm.AfterExperts(*behind)
    return (
        lambda h, d, m: list(norm.after_experts_ops(h, d, m, weights, scalar, EPS, following)),
        (x, x + 0, x + 1),
    )


def of_heads(load: Load, layer: int) -> Case:
    text = load.text
    dim, keys = text.head_dims[layer], text.num_key_value_heads[layer]
    weights = [known(seed, dim) for seed in (0, 1)]
    turn = [known(seed, 1, 1, load.rows, dim // 2, dtype=DTYPES[load.width]) for seed in (2, 3)]
    q, k = zeros(load, 1, load.rows, text.num_attention_heads * dim), zeros(load, 1, load.rows, keys * dim)

    def made(q: mx.array, k: mx.array, v: mx.array | None = None) -> list[mx.array]:
        return [x for x in heads.heads_ops(q, k, v, *weights, *turn, EPS) if x is not None]

    return made, (q, k) if text.full(layer) else (q, k, k + 0)


def attending(load: Load, layer: int) -> Case:
    text, length = load.text, load.config.canvas_length
    dim, keys = text.head_dims[layer], text.num_key_value_heads[layer]
    limit = None if text.full(layer) else text.window_keys
    visible = cache.visible_slots(np.array([load.prompt]), limit, rounded=True)
    q, k = zeros(load, 1, text.num_attention_heads, length, dim), zeros(load, 1, keys, length, dim)
    past = zeros(load, 1, keys, 2 * load.prompt, dim)
    return (
        lambda q, k, v, a, b: [attention.canvas_attention_ops(q, k, v, a, b, visible)],
        (q, k, k + 0, past, past + 0),
    )


def routing(load: Load) -> Case:
    text, scale = load.text, known(0, load.text.num_experts)
    return lambda x: one(moe.route_ops(x, scale, text.top_k_experts)), (zeros(load, load.rows, text.num_experts),)


def mixing(load: Load) -> Case:
    text = load.text
    ids = known(0, load.rows, text.top_k_experts, dtype=mx.uint32)
    routes = moe.Routes(known(1, *ids.shape), ids, ids.flatten(), ids.flatten(), ids)
    out = zeros(load, load.rows * text.top_k_experts, text.hidden_size)
    return lambda x: [moe.gather_sum_ops(x, routes, out.dtype)], (out,)


def gating(load: Load) -> Case:
    gate = zeros(load, load.rows, load.text.intermediate_size)
    return lambda g, u: [geglu.geglu_ops(g, u)], (gate, gate + 0)


def looking(load: Load) -> Case:
    """Everything between the two products of a slice."""
    rows = work.SLICE_ELEMENTS // load.text.vocab_size
    level, draws = known(0, rows), known(1, rows)

    def read(logits: mx.array) -> list[mx.array]:
        seen = head.look_ops(logits, 30.0, temperature=level, uniform=draws)
        values = [seen.argmax, seen.drawn, seen.entropy, seen.confidence]
        if load.width == 4:  # the weights at hand serve
            return [*values, seen.weight]
        return [*values, head.odds_ops(logits, 30.0, temperature=level, bias=None, seen=seen)]

    return read, (zeros(load, rows, load.text.vocab_size),)


def reading(load: Load) -> Case:
    """All that is done with the vocabulary, products among it."""
    dtype = DTYPES[load.width]
    table = Dense(zeros(load, load.text.vocab_size, load.text.hidden_size))
    network: Any = SimpleNamespace(table=table, config=load.text, dtype=dtype, ops=ops.PLAIN, scale=known(0, 1)[0])
    network.scale = network.scale.astype(dtype)
    mx.eval(network.scale)
    level, draws = known(1, load.batch), known(2, load.batch, load.config.canvas_length)

    def read(hidden: mx.array, weight: mx.array) -> list[mx.array]:
        network.table = Dense(weight)
        found = vocabulary.read_canvas(network, hidden, level, draws)
        return [found.argmax, found.drawn, found.entropy, found.confidence, found.soft]

    return read, (zeros(load, load.batch, load.config.canvas_length, load.text.hidden_size), table.weight)


# ---- bytes


def test_norms(load):
    """A layer in the middle: the norms behind attention, those behind the experts, and the next layer's."""
    traced = sum(bytes_of(*case[:1], *case[1]) for case in (after_attention(load), after_experts(load)))
    assert work_layers.norms(load, 1, False).nbytes == pytest.approx(traced, rel=0.004)


@LAYERS
def test_heads(load, layer):
    """Tables of RoPE are not counted: two, which each half of the queries and of the keys reads."""
    tables = 2 * 2 * 2 * load.rows * load.text.head_dims[layer] // 2 * load.width
    same(work_layers.heads(load, layer, False).nbytes + tables, of_heads(load, layer))


@LAYERS
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_attention(load, layer, prompt):
    load = dataclasses.replace(load, prompt=prompt)
    counted = work_layers.attention(load, layer, False).nbytes
    twice = work_layers.visible(load, layer, rounded=True) + load.config.canvas_length > work.READ_ONCE
    scores = load.rows * load.text.num_attention_heads * (prompt + load.config.canvas_length)
    same(counted - (scores * load.width if twice else 0), attending(load, layer))
    assert twice == (prompt == 4096 and layer == 5)


def test_router_without_its_product(load):
    text = load.text
    made = text.num_experts * text.hidden_size + load.rows * (text.hidden_size + text.num_experts)
    same(work_layers.router(load, 0, False).nbytes - made * load.width, routing(load))


def test_mixing(load):
    same(work_layers.mixing(load, 0, False).nbytes, mixing(load))


def test_geglu_is_one_pass_in_both(load):
    """So the count of the dense MLP and of the experts has it once, plain or with the kernel."""
    function, (gate, up) = gating(load)
    assert bytes_of(function, gate, up) <= 3 * gate.nbytes + 100


def test_between_the_products_of_the_vocabulary(load):
    few = dataclasses.replace(load, kept=work.SLICE_ELEMENTS // load.text.vocab_size)
    hidden, table = load.text.hidden_size, load.text.vocab_size * load.text.hidden_size * load.width
    product = (
        table + few.read_rows * (load.text.vocab_size + hidden) * load.width + few.read_rows * hidden * 2 * load.width
    )
    counted = work_ends.vocabulary(few, False).nbytes + work_ends.soft(few, False).nbytes - product
    same(counted, looking(load))


def test_vocabulary(load):
    parts = work_ends.costs(load, False)
    same(sum(parts[name].nbytes for name in work_ends.VOCABULARY), reading(load))


def test_vocabulary_in_larger_slices(load, monkeypatch):
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", work.SLICE_BYTES // load.width)
    parts = work_ends.costs(dataclasses.replace(load, wide=True), False)
    same(sum(parts[name].nbytes for name in work_ends.VOCABULARY), reading(load))


# ---- passes


CASES: dict[str, Callable[[Load], Case]] = {
    "after attention": after_attention,
    "heads": lambda load: of_heads(load, 0),
    "attention": lambda load: attending(dataclasses.replace(load, prompt=1500), 5),
    "route": routing,
    "gather, sum": mixing,
    "geglu": gating,
    "look, odds": looking,
}


@pytest.mark.parametrize("name", CASES)
def test_passes_are_those_of_mlx(load, name):
    function, arrays = CASES[name](load)
    assert passes_of(function, *arrays) == compiled_passes(function, *arrays)


def test_passes_behind_experts_are_those_of_mlx(load):
    """Where the stream is read by the next layer, too."""
    function, arrays = after_experts(load)

    def read(*arrays: mx.array) -> list[mx.array]:
        stream, x = function(*arrays)
        return [x, mx.sort(stream, -1)]

    assert passes_of(read, *arrays) == compiled_passes(read, *arrays)


def test_counted_as_compiled_is_less_than_eager(load):
    function, arrays = looking(load)
    assert bytes_of(function, *arrays) < 0.8 * bytes_of(function, *arrays, fuse=False)


def test_the_tape_counts_what_is_plain_to_see():
    x, y = mx.zeros((8, 16)), mx.zeros((8, 16), mx.bfloat16)
    assert bytes_of(lambda a: [mx.exp(a * 2 + 1)], x) == 2 * x.nbytes + 8
    assert bytes_of(lambda a: [mx.softmax(a * 2, -1)], x) == 4 * x.nbytes + 4
    assert bytes_of(lambda a: [(a.astype(mx.float32) * 3).T], y) == y.nbytes + x.nbytes + 4
    assert bytes_of(lambda a: [a.T.reshape(-1)], x) == 2 * x.nbytes, "out of order"
    assert bytes_of(lambda a: [mx.exp(a.reshape(-1))], x) == 2 * x.nbytes, "in order"
    assert bytes_of(lambda a: [a - a.max(-1, keepdims=True)], x) == x.nbytes + 32 + (x.nbytes + 32 + x.nbytes)
    both = mx.exp
    assert bytes_of(lambda a: [mx.sort(both(a)), mx.tanh(both(a))], x) == 6 * x.nbytes, "exp is written for both"
    assert passes_of(lambda a: [mx.exp(a * 2)], x) == Counter({"Exp Multiply": 1})
