"""Mistakes planted in kernels: each is found, by an error or by results that depend on the order of threads."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_cpu.metal import floats, run
from tests.metal_cpu.runner import Fault, poison
from tests.metal_cpu.translate import NotMetal

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
ORDERS = range(4)


def results(source: str, *inputs: mx.array, **more) -> int:
    """How many different results there are, over the orders."""
    return len({run(source, *inputs, order=order, **more).tobytes() for order in ORDERS})


# what is right, then the same with a mistake
REVERSED = "threadgroup float x[64]; x[i] = a[i]; WAIT o[i] = x[63 - i];"
PAIRS = "threadgroup float x[64]; x[i] = a[i]; WAIT o[i] = x[i ^ 1];"
ROUNDS = """threadgroup float x[64]; float sum = 0;
for (int n = 0; n < 4; n++) { x[i] = a[i] + n; BARRIER sum += x[(i + 33) % 64]; WAIT }
o[i] = sum;"""
ONE_PREPARES = "threadgroup float x[1]; if (i == 40) x[0] = a[i]; WAIT o[i] = x[0];"
MATRIX = """threadgroup float x[64]; simdgroup_float8x8 m; simdgroup_load(m, a); simdgroup_store(m, x);
WAIT o[i] = x[i] + x[i + 32];"""
NEIGHBOUR = "threadgroup float x[65]; x[i] = a[i]; BARRIER o[i] = x[i + 1];"
FLAGS = "threadgroup int x[2]; x[0] = 1; BARRIER o[i] = x[0] + x[1];"
SHARED_SUM = "threadgroup float x[1]; if (i == 0) x[0] = 0; BARRIER x[0] += a[i] * 0.1; BARRIER o[i] = x[0];"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
MISTAKES = {
    "no barrier": (REVERSED.replace("WAIT", BARRIER), REVERSED.replace("WAIT", "")),
    "no barrier within a simdgroup": (PAIRS.replace("WAIT", SIMD_BARRIER), PAIRS.replace("WAIT", "")),
    "no barrier before memory is used again": (ROUNDS.replace("WAIT", BARRIER), ROUNDS.replace("WAIT", "")),
    "a barrier of the simdgroup only": (REVERSED.replace("WAIT", BARRIER), REVERSED.replace("WAIT", SIMD_BARRIER)),
    "no barrier after one thread's work": (ONE_PREPARES.replace("WAIT", BARRIER), ONE_PREPARES.replace("WAIT", "")),
    "no barrier after a matrix is stored": (MATRIX.replace("WAIT", SIMD_BARRIER), MATRIX.replace("WAIT", "")),
    "floats that nobody wrote": (NEIGHBOUR.replace("i + 1", "i"), NEIGHBOUR),
    "integers that nobody wrote": (FLAGS.replace("x[1]", "x[0]"), FLAGS),
    "an output that nobody wrote": ("o[i] = a[i];", "if (i != 63) o[i] = a[i];"),
    "a sum in the order of threads": ("o[i] = simd_sum(a[i]);", SHARED_SUM),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_result_depends_on_the_order(mistake):
    right, wrong = (source.replace("BARRIER", BARRIER) for source in MISTAKES[mistake])
    threads = 32 if "8x8" in right else 64
    a = floats(64)
    assert results(right, a, threads=threads) == 1
    assert results(wrong, a, threads=threads) > 1


def test_poison_is_kept_apart_from_values():
    assert len({poison(order) for order in ORDERS}) == 4
    assert np.isnan(run("if (i > 4) o[i] = 1;")).sum() == 5
    assert results("if (i > 4) o[i] = true;", out=((64,), mx.bool_)) > 1
    assert results("if (i > 4) o[i] = 1;", out=((64,), mx.uint8)) > 1
    # nor is a variable of a thread zero, where the compiler cannot tell that nobody set it
    assert np.isnan(run("float x[64]; if (i < 60) x[i] = 1; o[i] = x[i];")[60:]).all()
    # threadgroup memory does not keep what the threadgroup before it wrote
    source = "threadgroup float x[32]; if (i < 32) x[i] = 7; o[i] = x[thread_index_in_threadgroup];"
    assert np.isnan(run(source, threads=32, out=((64,), mx.float32), grid=(64, 1, 1))[32:]).all()


# functions in which threads wait
HEADER = f"METAL_FUNC float total(float x) {{ return simd_sum(x); }}\nMETAL_FUNC void wait() {{ {BARRIER} }}\n"
FAULTS = {
    "o[i] = a[i + 64];": r"out-of-bounds access of a at byte \d+ ",
    "o[i] = a[int(i) - 1025];": r"out-of-bounds access of a at byte -\d+ ",
    "o[i] = a[i + 1000000];": "out-of-bounds access of a",
    "o[i + 1] = a[i];": "out-of-bounds access of o at byte 256",
    "o[i] = 0; o[int(i) - 1] = 1;": "out-of-bounds write next to o",
    "((device float*)a)[i] = 1; o[i] = 0;": "write to a, an input",
    "threadgroup float x[64]; x[i] = a[i]; o[i] = x[i + 1];": "threadgroup variable 0 at byte 256",
    "threadgroup float x[63]; x[i] = a[i]; o[i] = 0;": "write next to a threadgroup variable",
    "threadgroup float x[8193]; x[i] = a[i]; o[i] = x[i];": "more than 32768 bytes",
    "threadgroup float x[8000]; threadgroup half y[400]; x[i] = y[i] = 0; o[i] = x[i];": "more than 32768 bytes",
    "float s = 0; if (i % 2) s = simd_sum(a[i]); else s = simd_max(a[i]); o[i] = s;": "divergent operation",
    "for (uint n = 0; n < i % 3; n++) o[i] = simd_sum(a[i]);": "divergent operation",
    "if (i == 7) return; o[i] = simd_sum(a[i]);": "divergent operation",
    "float s; if (i % 2) s = total(a[i]); else s = total(a[i] * 2); o[i] = s;": "divergent operation",
    "if (i < 32) wait(); else wait(); o[i] = 0;": "wait at different barriers",
    "if (i < 9) simdgroup_barrier(mem_flags::mem_none); o[i] = 0;": "divergent operation",
    f"if (i < 32) {BARRIER} o[i] = a[i];": "a barrier is not reached by all threads",
    f"if (i == 5) return; {BARRIER} o[i] = a[i];": "a barrier is not reached by all threads",
    f"if (i < 32) {{ {BARRIER} }} else {{ {BARRIER} }} o[i] = a[i];": "wait at different barriers",
    "o[i] = 0; if (i < 32) wait(); else wait();": "wait at different barriers",
    "o[i] = 0; if (i % 2) total(a[i]); else total(a[i]);": "divergent operation",
    f"if (i < 16) {{ {BARRIER} }} else o[i] = simd_sum(a[i]);": "a barrier is not reached by all threads",
    "float x[40000]; for (int n = 0; n < 40000; n++) x[n] = a[n % 64] * n; o[i] = simd_sum(x[i * 9]);": "128 KiB",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("source", FAULTS)
def test_the_kernel_is_stopped(source, order):
    with pytest.raises(Fault, match=FAULTS[source]) as caught:
        run(source, floats(64), order=order, header=HEADER)
    assert "[threadgroup 0,0,0 thread" in str(caught.value) or "next to o" in str(caught.value)
    # and the next kernel runs as if nothing had been
    assert run("o[i] = simd_sum(a[i]);", mx.ones((64,)), order=order).tolist() == [32.0] * 64


def test_the_last_bytes_before_a_guard_are_poison():
    """63 floats end 4 bytes before it. Reads there are no fault, but differ; writes are found."""
    assert results("o[i] = a[i];", floats(63)) > 1
    with pytest.raises(Fault, match="write next to o"):
        run("o[i] = a[i];", floats(64), out=((63,), mx.float32))


def test_all_of_threadgroup_memory_can_be_had_by_every_threadgroup():
    source = f"threadgroup float x[8000]; threadgroup half y[384]; x[i % 64] = a[i]; y[i % 64] = 1; {BARRIER}"
    found = run(source + "o[i] = x[i % 64 ^ 1] + y[0];", floats(192), grid=(192, 1, 1), out=((192,), mx.float32))
    assert np.array_equal(found, np.array(floats(192)).reshape(96, 2)[:, ::-1].ravel() + 1)


def test_a_matrix_needs_a_whole_simdgroup():
    source = "simdgroup_float8x8 x(1.0f); simdgroup_multiply(x, x, x); o[i] = x.thread_elements().x;"
    assert run(source, floats(64), threads=32)[0] == 1
    with pytest.raises(Fault, match="all 32 lanes"):
        run(source, floats(64), threads=40)


def test_too_many_threads():
    with pytest.raises(Fault, match="1025 threads"):
        run("o[i] = 0;", threads=1025)
    # MLX cuts threadgroups to the grid
    assert run("o[i] = 1;", threads=8, threadgroup=(4096, 1, 1)).tolist() == [1] * 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("double x = a[i]; o[i] = x;", "no_double"),
        ("o[i] = std::exp(a[i]);", "'std'"),
        ("o[i] = expf(a[i]);", "expf"),
        ("o[i] = log1p(a[i]);", "log1p"),
        ('printf("%f", a[i]);', "printf"),
        ("o[i] = metal::nonsense(a[i]);", "nonsense"),
        ("o[i] = b[i];", "'b'"),
        ("try { o[i] = 1; } catch (int) {}", "no_exceptions"),
        ("thread float* x = new float[4]; o[i] = x[0];", "no_new"),
        ("o[i] = half(bfloat(a[i]));", "bfloat|__bf16"),
        ("o[i] = float4(a[i], a[i], a[i]).x;", "exactly as many elements"),
        ("a[i] = 0;", "read-only"),
        ("float x[a_ndim]; o[i] = x[0];", "variable length"),
        ("auto x = a[i] * 1.0L; o[i] = x;", "no double"),
        ("float x; o[i] = x + a[i];", "uninitialized"),
        ("o[i] = i", "expected ';'"),
    ],
)  # fmt: skip
def test_the_text_is_refused(source, message):
    with pytest.raises(NotMetal, match=message):
        run(source, floats(64))
