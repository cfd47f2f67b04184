"""Types and functions of Metal's library: those of MLX's own operations bit for bit, or NumPy's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_cpu.metal import floats, run

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
N = 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_is_rounded_as_mlx_rounds(dtype):
    a, b, c = (floats(N, dtype, seed) for seed in range(3))
    # MLX evaluates one operation at a time: nothing is kept in float between them, and no product is fused with a sum
    expected = [a + b, a - b, a * b, a / b, a * b + c, (a + b) * c - a]
    source = "o[i*6] = a[i]+b[i]; o[i*6+1] = a[i]-b[i]; o[i*6+2] = a[i]*b[i]; o[i*6+3] = a[i]/b[i];"
    source += "o[i*6+4] = a[i]*b[i] + c[i]; o[i*6+5] = (a[i]+b[i])*c[i] - a[i];"
    found = run(source, a, b, c, threads=1024, out=((N, 6), dtype), grid=(N, 1, 1))
    wide = [np.array(x.astype(mx.float32)) for x in expected]
    assert np.array_equal(found.astype(np.float32), np.stack(wide, 1))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_floats_are_narrowed_to_the_nearest_even(dtype):
    """All 65536 values, and the points halfway between them."""
    exact = mx.arange(65536).astype(mx.uint16).view(dtype).astype(mx.float32)
    finite = np.sort(np.array(exact)[np.isfinite(np.array(exact))])
    middle = mx.array(((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32))
    values = mx.concatenate([exact, middle])
    grid, n = (values.size, 1, 1), values.size
    found = run("o[i] = T(a[i]);", values, threads=1024, out=((n,), dtype), grid=grid, template=[("T", dtype)])
    assert np.array_equal(found.astype(np.float32), np.array(values.astype(dtype).astype(mx.float32)), equal_nan=True)


def test_functions_match_mlx():
    x = mx.abs(floats(256)) + 0.01
    names = ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "floor", "ceil", "round", "abs")
    source = "".join(f"o[i * {len(names)} + {n}] = metal::{name}(a[i]);" for n, name in enumerate(names))
    found = run(source, x, threads=256, out=((256, len(names)), mx.float32))
    expected = [getattr(np, name)(np.array(x).astype(np.float64)) for name in names if name != "rsqrt"]
    expected.insert(names.index("rsqrt"), np.array(x).astype(np.float64) ** -0.5)
    assert np.allclose(found, np.stack(expected, 1), rtol=3e-7, atol=3e-7)  # two units in the last place, sin of 16


def test_narrow_functions_are_rounded_once():
    x = floats(64, mx.float16)
    found = run("o[i] = metal::exp(a[i]);", x, out=((64,), mx.float16))
    assert np.array_equal(found, np.exp(np.array(x).astype(np.float32)).astype(np.float16))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("float(sizeof(1.5 * a[0]))", 4),  # a literal is a float, also where a template is filled in
        ("float(0.1 * 3.0 == 0.3f)", float(np.float32(0.1) * np.float32(3.0) == np.float32(0.3))),
        ("max(NAN, 2.0f) + min(3.0f, NAN)", 5),
        ("clamp(7.0f, -1.0f, 2.0f)", 2),
        ("select(1.0f, 2.0f, true)", 2),
        ("float(as_type<uint>(1.0f) == 0x3F800000)", 1),
        ("float(mulhi(0x80000000u, 6u) + popcount(7u) + clz(1u) + ctz(8u))", 40),
        ("float(rotate(0x80000001u, 1u) + rotate(1u, 32u))", 4),
        ("fma(2.0f, 3.0f, 4.0f) + pow(2.0f, 3.0f) + ldexp(1.5f, 2)", 24),
        ("float(isnan(NAN)) + float(isinf(-INFINITY)) + float(isfinite(1.0f))", 3),
        ("float(numeric_limits<half>::max()) + float(numeric_limits<ushort>::max())", 65504 + 65535),
        ("float(-numeric_limits<bfloat>::infinity() < numeric_limits<bfloat>::lowest())", 1),
        ("float4(1, float2(2, 3), 4).w + float4(5).y", 9),
        ("float4(1, 2, 3, 4).wzyx.x + float4(1, 2, 3, 4).yz.y", 7),
        ("dot(float3(1, 2, 3), float3(4, 5, 6))", 32),
        ("float(int4(float4(1.9, -1.9, 3, 4)).y)", -1),  # converted, not the same bits
        ("float(half4(float4(0.1f)).x) + float(bfloat2(0.1f, 0).x)", float(np.float16(0.1)) + 0.10009765625),
        ("float4(max(float4(1, 5, 2, 7), float4(3)) + exp(float4(0))).w", 8),
        ("float(is_same_v<bfloat16_t, bfloat> && sizeof(long) == 8 && sizeof(float3) == 16)", 1),
        ("(float)(uchar)300", 44),
    ],
)  # fmt: skip
def test_language(expression, value):
    found = run(f"o[i] = T({expression});", mx.ones((9,)), threads=1, template=[("T", mx.float32)])
    assert found[0] == np.float32(value)


def test_vectors_are_loaded_through_pointers_of_any_address_space():
    source = """
    threadgroup half4 x[64];
    x[i] = half4(((const device float4*)a)[i]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const threadgroup half* y = (const threadgroup half*)x;
    o[i] = float(y[255 - i]);
    """
    a = floats(256)
    assert np.array_equal(run(source, a), np.array(a).astype(np.float16)[::-1][:64].astype(np.float32))


def test_structs_may_live_in_threadgroup_memory():
    header = "struct Best { float value; uint place; };\n"
    source = "threadgroup Best x[64]; x[i] = Best{a[i], i}; threadgroup_barrier(mem_flags::mem_threadgroup);"
    a = floats(64)
    assert np.array_equal(run(source + "o[i] = x[63 - i].value;", a, header=header), np.array(a)[::-1])


def test_structs_are_copied_whole_from_and_to_memory():
    """Through pointers written in every form: of sixteen floats a thread moves the fours, and changes two."""
    header = "template <typename T, int N> struct alignas(N * sizeof(T)) Four { T at[N]; };\n"
    source = """
    const device float* from = a + i * 16;
    device float* to = o + i * 16;
    const Four<float, 4> first = *(const device Four<float, 4>*)(from + min(0, int(i)));
    Four<float, 4> second;
    if (i < 64) second = *(const device Four<float, 4>*)&from[4];
    second.at[1] = -second.at[1];
    *(device Four<float, 4>*)to = second;
    *(device Four<float, 4>*)(to + (2 + 2)) = first;
    *((device Four<float, 4>*)to + 2) = ((const device Four<float, 4>*)from)[3];
    ((device Four<float, 4>*)(const device float*)o)[i * 4 + 3] = *((device Four<float, 4>*)to + 2);
    ((device Four<float, 4>*)o + i * 4)->at[0] += ((const device Four<float, 4>*)(from))->at[3];
    """
    a = floats(1024)
    rows = np.array(a).reshape(64, 4, 4)
    expected = rows[:, [1, 0, 3, 3]]
    expected[:, 0, 1] *= -1
    expected[:, 0, 0] += rows[:, 0, 3]
    assert np.array_equal(run(source, a, header=header, out=((1024,), mx.float32)), expected.ravel())


@pytest.mark.parametrize(
    "dtype", [mx.int32, mx.uint32, mx.int64, mx.uint64, mx.int8, mx.uint8, mx.int16, mx.uint16, mx.bool_]
)
def test_every_type_of_array(dtype):
    a = (mx.arange(64) % 2).astype(dtype)
    found = run("o[i] = a[i];", a, out=((64,), dtype))
    assert np.array_equal(found, np.array(a)) and found.dtype == np.array(a).dtype
