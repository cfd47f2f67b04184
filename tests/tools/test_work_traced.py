"""The count of the plain version against the graphs that MLX makes of the plain operations: it is not inflated."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.mlx_backend.kernels import attention, geglu, head, heads, moe, norm
from mlx_diffgemma.tools import work_ends, work_layers
from mlx_diffgemma.tools.work import Cost, Load
from tests import tiny
from tests.tools.tape import bytes_of

DTYPES = {2: mx.bfloat16, 4: mx.float32}
PROMPT = 23
EPS = 1e-6
SIZES = {"hidden_size": 320, "vocab_size": 4096, "moe_intermediate_size": 96, "num_experts": 16, "top_k_experts": 4}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    found = ModelConfig.from_folder(tiny.checkpoint())
    return dataclasses.replace(found, text=dataclasses.replace(found.text, **SIZES))


@pytest.fixture(params=DTYPES, ids=["bfloat16", "float32"])
def load(request, config) -> Load:
    return Load(config, {}, prompt=PROMPT, width=request.param)


@pytest.fixture(autouse=True)
def norm_is_one_operation(monkeypatch):
    """As on a GPU, where it reads its input in the dtype of its result and writes that; on a CPU it would be ten."""

    def stand_in(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        if weight is None:
            return mx.sort(x, -1)
        # A product, for tracing merges calls that are the same, and these differ by their weights.
        return x.astype(mx.float32) @ mx.broadcast_to(weight[:, None], (weight.size, weight.size))

    monkeypatch.setattr(mx.fast, "rms_norm", stand_in)


def zeros(load: Load, *shape: int) -> mx.array:
    return mx.zeros(shape, DTYPES[load.width])


def weight_of(size: int, seed: int) -> mx.array:
    weight = mx.random.uniform(shape=(size,), key=mx.random.key(seed))
    mx.eval(weight)
    return weight


def within(counted: float, traced: int, *, low: float) -> None:
    """At most what the graph moves, with elementwise chains as one pass; ``low``: how much may be left out of it."""
    assert low * traced <= counted <= 1.01 * traced, f"{counted / traced:.3f} of what the graph moves"


def one(weights: object) -> list[mx.array]:
    return [getattr(weights, f.name) for f in dataclasses.fields(weights)]


def attention_norms(load: Load) -> int:
    x = zeros(load, 1, load.rows, load.text.hidden_size)
    first, second, third, router = (weight_of(load.text.hidden_size, seed) for seed in range(4))
    weights = norm.AfterAttention(first, second, third, router.astype(x.dtype))
    return bytes_of(lambda h, a: one(norm.after_attention_ops(h, a, weights, EPS)), x, x + 0)


def experts_norms(load: Load) -> int:
    x, scalar = zeros(load, 1, load.rows, load.text.hidden_size), zeros(load, 1)
    *behind, following = (weight_of(load.text.hidden_size, seed) for seed in range(4))
    weights = norm.AfterExperts(*behind)
    return bytes_of(
        lambda h, d, m: list(norm.after_experts_ops(h, d, m, weights, scalar, EPS, following)), x, x + 0, x + 1
    )


def test_norms(load):
    """A layer in the middle: the norms behind attention, those behind the experts, and the next layer's."""
    within(work_layers.norms(load, 1, False).nbytes, attention_norms(load) + experts_norms(load), low=0.9)


@pytest.mark.parametrize("layer", [0, 5], ids=["sliding", "full"])
def test_heads(load, layer):
    text = load.text
    dim, keys = text.head_dims[layer], text.num_key_value_heads[layer]
    weight, turn = mx.ones(dim), zeros(load, 1, 1, load.rows, dim // 2)
    q, k = zeros(load, 1, load.rows, text.num_attention_heads * dim), zeros(load, 1, load.rows, keys * dim)
    inputs = (q, k) if text.full(layer) else (q, k, k + 0)

    def made(q: mx.array, k: mx.array, v: mx.array | None = None) -> list[mx.array]:
        return [x for x in heads.heads_ops(q, k, v, weight, weight, turn, turn, EPS) if x is not None]

    traced = bytes_of(made, *inputs)
    within(work_layers.heads(load, layer, False).nbytes, traced, low=0.8)


@pytest.mark.parametrize("layer", [0, 5], ids=["sliding", "full"])
def test_attention(load, layer):
    """Today's plain attention joins scores where the counted one stored keys and values: no less is moved."""
    text, length = load.text, load.config.canvas_length
    dim, keys = text.head_dims[layer], text.num_key_value_heads[layer]
    prefix = PROMPT if text.full(layer) else min(PROMPT, text.window_keys)
    visible = attention.Visible(prefix, mx.array([prefix]), True)
    q, k = zeros(load, 1, text.num_attention_heads, length, dim), zeros(load, 1, keys, length, dim)
    past = zeros(load, 1, keys, prefix, dim)
    traced = bytes_of(
        lambda q, k, v, a, b: [attention.canvas_attention_ops(q, k, v, a, b, visible)], q, k, k + 0, past, past + 0
    )
    within(work_layers.attention(load, layer, False).nbytes, traced, low=0.5)


def routed(scores: mx.array, scale: mx.array, count: int) -> list[mx.array]:
    """Routing as it was before it had a kernel."""
    odds = mx.softmax(scores.astype(mx.float32), -1, precise=True)
    chosen = mx.argsort(-odds, -1)[:, :count]
    weight = mx.take_along_axis(odds, chosen, -1)
    weight = weight / weight.sum(-1, keepdims=True) * scale[chosen]
    pairs = chosen.reshape(-1)
    order = mx.argsort(pairs)
    return [weight, pairs[order], order // count, mx.argsort(order)]


def test_router_without_its_product(load):
    text = load.text
    scores, scale = zeros(load, load.rows, text.num_experts), mx.ones(text.num_experts)
    traced = bytes_of(lambda x: routed(x, scale, text.top_k_experts), scores)
    made = text.num_experts * text.hidden_size + load.rows * (text.hidden_size + text.num_experts)
    within(work_layers.router(load, 0, False).nbytes - made * load.width, traced, low=0.8)


def test_mixing(load):
    text = load.text
    pairs = load.rows * text.top_k_experts
    ids = mx.zeros((load.rows, text.top_k_experts), mx.uint32)
    routes = moe.Routes(mx.zeros(ids.shape), ids, ids.flatten(), ids.flatten(), ids)
    out = zeros(load, pairs, text.hidden_size)
    traced = bytes_of(lambda x: [moe.gather_sum_ops(x, routes, out.dtype)], out)
    within(work_layers.mixing(load, 0, False).nbytes, traced, low=0.7)


def test_geglu_is_one_pass_in_both(load):
    """So the count of the dense MLP and of the experts has it once, plain or with the kernel."""
    gate = zeros(load, load.rows, load.text.intermediate_size)
    assert bytes_of(lambda g, u: [geglu.geglu_ops(g, u)], gate, gate + 0) <= 3 * gate.nbytes + 100


def test_vocabulary_and_probabilities(load):
    """Everything between the two products."""
    rows, vocab = load.rows, load.text.vocab_size
    level, draws = mx.ones(rows), mx.zeros(rows)

    def read(logits: mx.array) -> list[mx.array]:
        seen = head.look_ops(logits, 30.0, temperature=level, uniform=draws)
        values = [seen.argmax, seen.drawn, seen.entropy, seen.confidence]
        if load.width == 4:  # the weights at hand serve
            return [*values, seen.weight]
        return [*values, head.odds_ops(logits, 30.0, temperature=level, bias=None, seen=seen)]

    traced = bytes_of(read, zeros(load, rows, vocab))
    soft = work_ends.soft(load, False).nbytes
    hidden = load.text.hidden_size
    product = (
        load.slices(False) * vocab * hidden + rows * (vocab + hidden)
    ) * load.width + rows * hidden * 2 * load.width
    within(work_ends.vocabulary(load, False).nbytes + soft - product, traced, low=0.6)


def test_counted_as_compiled_is_less_than_eager(load):
    logits = zeros(load, load.rows, load.text.vocab_size)
    level = mx.ones(load.rows)

    def read(x: mx.array) -> list[mx.array]:
        return [head.look_ops(x, 30.0, temperature=level, uniform=level).entropy]

    assert bytes_of(read, logits) < 0.8 * bytes_of(read, logits, fuse=False)


def test_the_tape_counts_what_is_plain_to_see():
    x, y = mx.zeros((8, 16)), mx.zeros((8, 16), mx.bfloat16)
    assert bytes_of(lambda a: [mx.exp(a * 2 + 1)], x) == 2 * x.nbytes + 8
    assert bytes_of(lambda a: [mx.softmax(a * 2, -1)], x) == 4 * x.nbytes + 4
    assert bytes_of(lambda a: [(a.astype(mx.float32) * 3).T], y) == y.nbytes + x.nbytes + 4
    assert bytes_of(lambda a: [a - a.max(-1, keepdims=True)], x) == x.nbytes + 32 + (x.nbytes + 32 + x.nbytes)
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
