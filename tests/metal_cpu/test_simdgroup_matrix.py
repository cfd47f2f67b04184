"""8 x 8 matrices of a simdgroup, against NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_cpu.compile import NotMetal
from tests.metal_cpu.metal import floats, run

NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("place", ["device", "threadgroup"])
@pytest.mark.parametrize(("into", "out"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_load_and_store(dtype, place, into, out, order):
    """A block at row 2, column 3 of rows of 13 goes to row 1, column 4 of rows of 12, transposed or not at each end."""
    x = floats(13 * 13, dtype)
    source = f"""
    simdgroup_matrix<T, 8, 8> m;
    threadgroup T x[169];
    for (uint k = i; k < 169; k += 32) x[k] = a[k];
    for (uint k = i; k < 108; k += 32) o[k] = 0;
    simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    simdgroup_load(m, {"x" if place == "threadgroup" else "a"}, 13, ulong2(3, 2), {into});
    simdgroup_store(m, o, 12, ulong2(4, 1), {out});
    """
    found = run(source, x, threads=32, order=order, out=((9, 12), dtype), template=[("T", dtype)])
    block = np.array(x.astype(mx.float32)).reshape(13, 13)[2:10, 3:11]
    expected = np.zeros((9, 12), np.float32)
    expected[1:, 4:] = block.T if into != out else block
    assert np.array_equal(found.astype(np.float32), expected)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "types", [("float",) * 3, ("half",) * 3, ("bfloat",) * 3, ("half", "half", "float"), ("bfloat", "float", "float")]
)
def test_multiply_accumulate(types, order):
    """A, B, C and the result as C; sums are in float, and rounded at the end."""
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    a, b, c = (floats(64, dtypes[name], seed) for seed, name in enumerate(types))
    source = f"simdgroup_{types[0]}8x8 x; simdgroup_{types[1]}8x8 y; simdgroup_{types[2]}8x8 z, d;"
    source += "simdgroup_load(x, a); simdgroup_load(y, b); simdgroup_load(z, c);"
    source += "simdgroup_multiply_accumulate(d, x, y, z); simdgroup_store(d, o);"
    found = run(source, a, b, c, threads=32, order=order, out=((8, 8), dtypes[types[2]]))
    x, y, z = (np.array(m.astype(mx.float32)).astype(np.float64).reshape(8, 8) for m in (a, b, c))
    # eight fused operations on numbers below 16 * 16 * 8, each within half a unit, then one rounding
    slack = 8 * 2048 * 2.0**-24
    exact = x @ y + z
    rounding = {"float": 0, "half": 2.0**-11, "bfloat": 2.0**-8}[types[2]]
    assert (np.abs(found - exact) <= slack + rounding * (np.abs(exact) + slack)).all()


def test_the_result_is_rounded_once():
    """1 + 8 * 2^-12 in half: each addend alone would vanish."""
    a = mx.full((64,), 2.0**-6, mx.float16)
    source = """
    simdgroup_half8x8 x, y = make_filled_simdgroup_matrix<half, 8, 8>(half(1));
    simdgroup_load(x, a);
    simdgroup_multiply_accumulate(y, x, x, y);
    simdgroup_store(y, o);
    """
    found = run(source, a, threads=32, out=((8, 8), mx.float16))
    assert (found == np.float16(1 + 2.0**-9)).all()


def test_one_value_makes_a_diagonal_another_function_fills():
    source = """
    simdgroup_float8x8 x = make_filled_simdgroup_matrix<float, 8, 8>(3.0f), y(2.0f);
    simdgroup_store(x, o);
    simdgroup_store(y, o + 64);
    simdgroup_multiply(x, y, x);
    simdgroup_store(x, o + 128);
    """
    found = run(source, threads=32, out=((3, 8, 8), mx.float32))
    assert np.array_equal(found, [np.full((8, 8), 3), 2 * np.eye(8), np.full((8, 8), 6)])


def test_elements_lie_where_mlx_expects_them():
    """Two neighbours of a row per lane; the formula is that of MLX's steel/gemm/mma.h."""
    source = "simdgroup_float8x8 m; simdgroup_load(m, a); ((device float2*)o)[i] = m.thread_elements();"
    found = run(source, mx.arange(64).astype(mx.float32), threads=32, out=((32, 2), mx.float32))
    for lane in range(32):
        quad = lane // 4
        row, column = (quad & 4) + (lane // 2) % 4, (quad & 2) * 2 + (lane % 2) * 2
        assert found[lane].tolist() == [row * 8 + column, row * 8 + column + 1]


def test_loads_convert_nothing():
    with pytest.raises(NotMetal, match="converts nothing"):
        run("simdgroup_half8x8 m; simdgroup_load(m, a); simdgroup_store(m, (device half*)o);", floats(64), threads=32)
