"""Threads, their order, barriers, atomics, and what a kernel is told of the grid."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_cpu.metal import INDEX, call, floats, kernel, run
from tests.metal_cpu.runner import Fault, emulate, thread_order
from tests.metal_cpu.translate import ATTRIBUTES

ORDERS = range(4)
GRID, MOST = (5, 7, 3), (4, 3, 2)  # threadgroups are cut off at every edge


def attributes(order: int) -> dict[str, np.ndarray]:
    """Of every thread of GRID, [z, y, x, 3]; numbers that are not vectors are in all three places."""
    place = "((thread_position_in_grid.z * 7 + thread_position_in_grid.y) * 5 + thread_position_in_grid.x)"
    writes = [
        f"{{ const uint3 v = uint3({name}); for (uint k = 0; k < 3; k++) o[({place} * COUNT + {n}) * 3 + k] = v[k]; }}"
        for n, name in enumerate(ATTRIBUTES)
    ]
    lines = kernel("\n".join(writes).replace("COUNT", str(len(ATTRIBUTES))), 0)
    shape = (3, 7, 5, len(ATTRIBUTES), 3)
    with thread_order(order):
        (found,) = emulate(lines, [], call(1, shape, mx.uint32, grid=GRID, threadgroup=MOST))
    return {name: np.array(found)[..., n, :] for n, name in enumerate(ATTRIBUTES)}


@pytest.mark.parametrize("order", ORDERS)
def test_attributes(order):
    found = attributes(order)
    for z, y, x in itertools.product(range(3), range(7), range(5)):
        at = np.array([x, y, z])
        group, inside = at // MOST, at % MOST
        size = np.minimum(MOST, np.array(GRID) - group * MOST)
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        expected = {
            "thread_position_in_grid": at, "threadgroup_position_in_grid": group,
            "thread_position_in_threadgroup": inside,
            "threads_per_threadgroup": size, "dispatch_threads_per_threadgroup": MOST, "grid_size": GRID,
            "threads_per_grid": GRID, "threadgroups_per_grid": [2, 3, 2], "grid_origin": [0] * 3,
            "thread_index_in_threadgroup": index, "thread_index_in_simdgroup": index % 32,
            "simdgroup_index_in_threadgroup": index // 32, "quadgroup_index_in_threadgroup": index // 4,
            "thread_index_in_quadgroup": index % 4, "simdgroups_per_threadgroup": -(-size.prod() // 32),
            "quadgroups_per_threadgroup": -(-size.prod() // 4), "dispatch_simdgroups_per_threadgroup": 1,
            "dispatch_quadgroups_per_threadgroup": 6, "thread_execution_width": 32, "threads_per_simdgroup": 32,
        }  # fmt: skip
        assert set(expected) == set(ATTRIBUTES)
        for name, value in expected.items():
            assert np.array_equal(found[name][z, y, x], np.broadcast_to(value, 3)), (name, at)


def turns(order: int) -> np.ndarray:
    """When each of 96 threads of a threadgroup had its turn."""
    source = """
    threadgroup atomic_uint n;
    if (i == 0) atomic_store_explicit(&n, 0, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = atomic_fetch_add_explicit(&n, 1, memory_order_relaxed);
    """
    return run(source, threads=96, order=order, out=((96,), mx.uint32))


def test_orders_differ():
    found = [turns(order) for order in range(6)]
    assert found[0].tolist() == list(range(96)) and found[1].tolist() == list(range(95, -1, -1))
    assert len({tuple(x) for x in found}) == 6
    for x in found:
        # a simdgroup runs until it waits, so its lanes take neighbouring turns
        assert sorted(x.tolist()) == list(range(96))
        assert sorted(n // 32 for n in x.reshape(3, 32).min(1).tolist()) == [0, 1, 2]
    assert any(
        not np.array_equal(np.argsort(a.reshape(3, 32)), np.argsort(b.reshape(3, 32)))
        for a, b in itertools.pairwise(found[2:])
    )
    assert np.array_equal(turns(3), found[3])  # the same seed, the same order


def test_threadgroups_come_in_an_order_of_their_own():
    """Each counts on from the one before it in memory that they share, which only one processor allows."""
    source = (
        "if (thread_index_in_threadgroup == 0) { uint n = 0; while (p[n]) n++; p[n] = i / 32 + 1; o[i / 32] = n; } "
    )
    seen = []
    for order in range(6):
        arguments = call(32, (8,), mx.uint32, grid=(256, 1, 1), init_value=0)
        arguments |= {"output_shapes": [(8,), (9,)], "output_dtypes": [mx.uint32] * 2}
        with thread_order(order):
            seen.append(tuple(np.array(emulate(kernel(source, 0, 2), [], arguments)[0]).tolist()))
    assert seen[0] == tuple(range(8)) and seen[1] == tuple(range(7, -1, -1)) and len(set(seen)) == 6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [64, 1024, 75])
def test_barriers(threads, order):
    """Every thread reads what another simdgroup wrote, and overwrites it in the next round."""
    source = """
    threadgroup float x[N];
    float sum = 0;
    for (uint round = 0; round < 5; round++) {
        x[i] = a[i] * round;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum += x[(i + 33 + round) % N];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    o[i] = sum;
    """
    x = floats(threads)
    found = run(source, x, threads=threads, order=order, template=[("N", threads)])
    wide, places = np.array(x), np.arange(threads)
    expected = np.zeros(threads, np.float32)
    for turn in range(5):
        expected += wide[(places + 33 + turn) % threads] * np.float32(turn)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_within_a_simdgroup(order):
    source = "threadgroup float x[64]; x[i] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = x[i ^ 31];"
    x = floats(64)
    assert np.array_equal(run(source, x, order=order), np.array(x).reshape(2, 32)[:, ::-1].ravel())


@pytest.mark.parametrize("order", ORDERS)
def test_branches_around_an_operation_do_not_take_it_apart(order):
    """A compiler for one thread would make two paths of it, each with a call of its own."""
    source = """
    float x = 3;
    const bool odd = a[i] > 0;
    if (odd) {
        o[i] = 1;
        for (int n = 0; n < a_shape[0] / 64; n++) x += metal::exp(a[i] + n);
    }
    x = simd_shuffle_xor(x, 0);
    if (odd) o[i] += x; else o[i] = -x;
    """
    x = floats(64)
    wide = np.array(x)
    assert np.allclose(run(source, x, order=order), np.where(wide > 0, np.exp(wide) + 4, -3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_threads_may_end_early_where_nobody_waits(order):
    found = run("if (i >= 50) return; o[i] = 2;", threads=64, order=order, out=((50,), mx.float32))
    assert (found == 2).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "last",
    [
        "simd_sum(a[i]);", "o[i] = 2; simdgroup_barrier(mem_flags::mem_none);", "wait();", "o[i] = simd_max(a[i]);",
        "if (simdgroup_index_in_threadgroup == 1) o[i] = simd_min(a[i]);",
    ],
)  # fmt: skip
def test_a_kernel_may_end_with_an_operation(last, order):
    """Lanes end one by one, right behind it, while others have yet to come back from it. The next threadgroup runs."""
    header = "METAL_FUNC void wait() { threadgroup_barrier(mem_flags::mem_threadgroup); }\n"
    source = f"o[i] = 2; if (simd_sum(a[i]) == 0) o[i] = 3; {last}"
    twice = mx.ones((200,)) * 2
    for _ in range(2):
        found = run(source, twice, threads=72, order=order, header=header, grid=(200, 1, 1), out=((200,), mx.float32))
        assert found.tolist() == [2] * 200


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(order):
    source = """
    threadgroup atomic_uint n[8];
    if (i < 8) atomic_store_explicit(&n[i], i == 3 ? 0xFFFFu : 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&n[0], i, memory_order_relaxed);
    atomic_fetch_sub_explicit(&n[1], 1, memory_order_relaxed);
    atomic_fetch_max_explicit(&n[2], i, memory_order_relaxed);
    atomic_fetch_min_explicit(&n[3], i + 5, memory_order_relaxed);
    atomic_fetch_or_explicit(&n[4], i, memory_order_relaxed);
    atomic_fetch_xor_explicit(&n[5], i & 1, memory_order_relaxed);
    atomic_fetch_and_explicit(&n[3], 0xFFu, memory_order_relaxed);
    uint seen = atomic_load_explicit(&n[6], memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&n[6], &seen, seen + 2, memory_order_relaxed,
                                                  memory_order_relaxed)) {}
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i < 8) o[i] = i == 7 ? atomic_exchange_explicit(&n[7], 9u, memory_order_relaxed)
                             : atomic_load_explicit(&n[i], memory_order_relaxed);
    """
    found = run(source, threads=64, order=order, out=((8,), mx.uint32))
    assert found.tolist() == [2016, 2**32 - 64, 63, 5, 63, 0, 128, 0]


def test_outputs_start_with_init_value():
    for dtype in (mx.float32, mx.bfloat16, mx.int32):
        found = run("if (i < 32) o[i] = 1;", out=((64,), dtype), init_value=3)
        assert found.tolist() == [1] * 32 + [3] * 32


def test_inputs_become_row_contiguous():
    x = floats(64 * 3).reshape(3, 64)
    for view in (x.T, x[:, ::2].T, mx.broadcast_to(x[0, :2], (64, 2))):
        columns = view.shape[1]
        source = (
            "for (int k = 0; k < a_shape[1]; k++) o[i * COLUMNS + k] = a[i * a_strides[0] + k * a_strides[1]] + a_ndim;"
        )
        found = run(source, view, threads=view.shape[0], out=(view.shape, mx.float32), template=[("COLUMNS", columns)])
        assert np.array_equal(found, np.array(view) + 2)


def test_arrays_without_elements():
    found = run("o[i] = a_shape[0] + 1;", mx.zeros((0, 3)), mx.zeros((0,), mx.bfloat16), threads=4)
    assert found.tolist() == [1] * 4
    assert run("if (i > 9) o[0] = 1;", threads=4, out=((0, 5), mx.bfloat16)).shape == (0, 5)


def test_a_grid_without_threads_is_refused():
    with pytest.raises(Fault, match="nothing to run"):
        run("o[i] = 0;", grid=(0, 1, 1))


def test_lines_of_messages_are_those_of_the_text():
    with pytest.raises(Fault, match=r"line (\d+)") as caught:
        run("if (i < 5)\n/* a\ncomment */ threadgroup_barrier(mem_flags::mem_threadgroup);\no[i] = 0;", threads=64)
    # PRELUDE has one line, the signature three, then come INDEX and three of the source
    assert f"line {1 + 3 + INDEX.count(chr(10)) + 3} " in str(caught.value)
