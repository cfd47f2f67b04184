"""Operations of a simdgroup, against NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_cpu.metal import floats, run

ORDERS = range(4)
LANES = 32


def integers(n: int) -> np.ndarray:
    return np.array(mx.random.randint(1, 1000, (n,), key=mx.random.key(3)), np.int32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 64, 96, 45, 7])
@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("sum", np.add), ("product", np.multiply), ("max", np.maximum), ("min", np.minimum),
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor),
    ],
)  # fmt: skip
def test_reductions(name, reduce, threads, order):
    """A simdgroup at the end may be short: its missing lanes take no part."""
    x = integers(threads)
    found = run(f"o[i] = simd_{name}(a[i]);", mx.array(x), threads=threads, order=order, out=((threads,), mx.int32))
    assert found.tolist() == [
        int(reduce.reduce(x[i // LANES * LANES :][:LANES], dtype=np.int32)) for i in range(threads)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_sums_of_floats_are_rounded_at_every_step(dtype):
    x = floats(64, dtype)
    found = run("o[i] = simd_sum(a[i]);", x, out=((64,), dtype))
    for half in range(2):
        total = x[half * LANES]
        for i in range(1, LANES):
            total = total + x[half * LANES + i]
        assert found[half * LANES] == total.item()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("call", "source"),
    [
        ("simd_shuffle(a[i], (i * 7 + 3) % 32)", lambda i: (i * 7 + 3) % 32),
        ("simd_broadcast(a[i], 5)", lambda i: 5),
        ("simd_broadcast_first(a[i])", lambda i: 0),
        ("simd_shuffle_xor(a[i], 12)", lambda i: i ^ 12),
        ("simd_shuffle_down(a[i], 3)", lambda i: i + 3 if i < 29 else i),
        ("simd_shuffle_up(a[i], 3)", lambda i: i - 3 if i > 2 else i),
        ("simd_shuffle_rotate_down(a[i], 3)", lambda i: (i + 3) % 32),
        ("simd_shuffle_rotate_up(a[i], 3)", lambda i: (i - 3) % 32),
    ],
)  # fmt: skip
def test_shuffles(call, source, order):
    x = np.array(floats(64))
    found = run(f"o[i] = {call};", mx.array(x), order=order)
    assert found.tolist() == [x[i // LANES * LANES + source(i % LANES)] for i in range(64)]


@pytest.mark.parametrize("order", ORDERS)
def test_prefixes(order):
    x = integers(64)
    source = "o[i*4] = simd_prefix_inclusive_sum(a[i]); o[i*4+1] = simd_prefix_exclusive_sum(a[i]);"
    source += "o[i*4+2] = simd_prefix_inclusive_product(a[i]); o[i*4+3] = simd_prefix_exclusive_product(a[i]);"
    found = run(source, mx.array(x), order=order, out=((64, 4), mx.int32))
    rows = x.reshape(2, LANES)
    sums, products = np.cumsum(rows, 1, dtype=np.int32), np.cumprod(rows, 1, dtype=np.int32)
    first = np.ones((2, 1), np.int32)
    before = [sums - rows, np.concatenate([first, products[:, :-1]], 1)]
    expected = np.stack([sums, before[0], products, before[1]], -1)
    assert np.array_equal(found, expected.reshape(64, 4))


@pytest.mark.parametrize("order", ORDERS)
def test_votes(order):
    source = "const bool odd = a[i] == 1; o[i*4] = uint((simd_vote::vote_t)simd_ballot(odd));"
    source += "o[i*4+1] = simd_any(odd); o[i*4+2] = simd_all(odd || i < 32); o[i*4+3] = simd_is_first();"
    odd = mx.arange(64) % 2
    found = run(source, odd, order=order, out=((64, 4), mx.uint32))
    assert (found[:, 0] == 0xAAAAAAAA).all() and (found[:, 1] == 1).all()
    assert found[:, 2].tolist() == [1] * 32 + [0] * 32 and np.nonzero(found[:, 3])[0].tolist() == [0, 32]


def test_vectors_and_pairs_of_values_are_exchanged_whole():
    x = floats(256)
    found = run(
        "((device float4*)o)[i] = simd_shuffle_xor(((const device float4*)a)[i], 1);", x, out=((256,), mx.float32)
    )
    assert np.array_equal(found.reshape(32, 2, 4), np.array(x).reshape(32, 2, 4)[:, ::-1])


def test_what_is_read_from_a_lane_that_is_not_there_is_poison():
    found = [run("o[i] = simd_shuffle_down(a[i], 1);", floats(40), threads=40, order=order)[39] for order in ORDERS]
    assert len({value.tobytes() for value in found}) == len(ORDERS)
