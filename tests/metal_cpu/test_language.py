"""What Metal refuses and C++ does not: address spaces left out or mixed up, and what later standards brought."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.metal_cpu.compile import check
from tests.metal_cpu.metal import call, floats, kernel, run
from tests.metal_cpu.text import generated
from tests.metal_cpu.translate import NotMetal, check_pointers, checked_casts
from tests.metal_kernels.test_limits import launches

# Every text has structs of its own, which clang keeps in no address space: nothing may be let off for them.
HEADER = """
struct alignas(8) Two { float at[2]; };
METAL_FUNC float near(const threadgroup float* x) { return x[0]; }
METAL_FUNC float far(const device float* x) { return x[0]; }
METAL_FUNC float own(thread float& x) { return x; }
"""
RIGHT = """
threadgroup float x[4]; threadgroup Two pairs[64];
x[i % 4] = 1; pairs[i] = Two{1, 2};
float y[2] = {far(a), near(x)};
Two two = *(const device Two*)(a + i / 2 * 2);
*(device Two*)(o + i / 2 * 2) = two;
o[i] = own(y[1]) + ((device Two*)o)->at[0];
"""
WRONG = {
    "o[i] = near(a);": "no matching function",
    "threadgroup float x[4]; o[i] = far(x);": "no matching function",
    "float x[4]; o[i] = near(x);": "no matching function",
    "o[i] = own(o[i]);": "no matching function",
    "o[i] = near((const threadgroup float*)a);": "cannot change the address space",
    "threadgroup float x[4]; o[i] = ((device float*)&x[1])[i];": "cannot change the address space",
    "*(threadgroup Two*)(o) = Two{1, 2};": "cannot change the address space",
    "float y[4]; o[i] = far((const device float*)y);": "cannot change the address space",
    "o[i] = far(reinterpret_cast<const threadgroup float*>(a));": "reinterpret_cast",
    "const thread float* x = a; o[i] = x[0];": "cannot initialize",
    "const threadgroup float* x = a; o[i] = x[0];": "cannot initialize",
    "threadgroup float x[4]; device float* y = x; o[i] = y[0];": "cannot initialize",
    "const float* x = a; o[i] = x[0];": "without address space",
    "*(const device Two*)o = Two{1, 2};": "no viable overloaded '='",
    "((const device Two*)o)[i] = *(device Two*)o;": "no viable|const",
    "((const device Two*)o)->at[0] = 1;": "const",
    "if constexpr (sizeof(Two) == 8) o[i] = 1;": "constexpr if is a C\\+\\+17",
    "const Two two = {1, 2}; const auto [x, y] = two.at; o[i] = x + y;": "structured binding.* a C\\+\\+17",
    "if (const float x = a[i]; x > 0) o[i] = x;": "C\\+\\+17",
    "const Two two = {.at = {1, 2}}; o[i] = two.at[0];": "C\\+\\+20",
    "register float x = a[i]; o[i] = x;": "register",
}


def test_what_is_right_compiles():
    assert (run(RIGHT, floats(64), header=HEADER) != 0).all()


@pytest.mark.parametrize("source", WRONG)
def test_the_text_is_refused(source):
    with pytest.raises(NotMetal, match=WRONG[source]):
        check(generated(kernel(source, 1, 1, HEADER), [floats(64)], call(64, (64,))).text)


@pytest.mark.parametrize(
    "header",
    [
        "namespace outer::inner { constexpr constant int n = 1; }",
        "template <typename... T> METAL_FUNC float sum(T... x) { return (x + ...); }",
        "template <auto N> METAL_FUNC int number() { return N; }",
        "struct Own { inline static int n = 1; };",
    ],
)
def test_a_header_of_a_later_standard_is_refused(header):
    with pytest.raises(NotMetal, match=r"C\+\+17|not allowed in template parameter until"):
        check(generated(kernel("o[i] = 0;", 0, 1, header + "\n"), [], call(64, (64,))).text)


@pytest.mark.parametrize(
    "text",
    [
        "float* x;", "const half4 *x = y;", "f(float& x)", "auto& x = y;", "vec<T, 4>* x;", "void f(uint &x);",
        "struct Own {}; Own* x;", "struct alignas(N * sizeof(T)) Own {}; const Own& x;", "typename T> f(T* x)",
        "f(const float (&x)[4])", "reinterpret_cast<float*>(x)", "device float* x, float* y", "(float*)x",
        "uint const& x", "simdgroup_float8x8& m",
    ],
)  # fmt: skip
def test_pointers_without_address_space(text):
    with pytest.raises(NotMetal, match="without address space"):
        check_pointers(text)


@pytest.mark.parametrize(
    "text",
    [
        "device float* x;", "const half4 device *x;", "f(thread float& x, thread const float (&y)[4])",
        "thread auto& x", "simdgroup_float8x8 m; (m)",
        "typename T> f(const device T* x, threadgroup vec<T, 4>& y)", "float(a) * b & uint(c)", "sizeof(float) * x",
        "a.half * b", "is_same_v<T, float> && x", "atomic_store_explicit(&n[i], x)", "x * y", "struct Own {}; y & z",
    ],
)  # fmt: skip
def test_pointers_with_address_space_and_products(text):
    check_pointers(text)


@pytest.mark.parametrize(
    ("text", "casts"),
    [
        ("((device T*)a)[i] + b", "((AS<device T*>(a)))[i] + b"),
        ("*(const device V<T, N>*)(a + f(b)) = c", "*(AS<const device V<T, N>*>((a + f(b)))) = c"),
        ("(thread T*)&x.y[f(0)] + 2", "(AS<thread T*>(&x.y[f(0)])) + 2"),
        ("(vec<T, 4> device*)p", "(AS<vec<T, 4> device*>(p))"),
        ("(device A*)(device B*)p", "(AS<device A*>((AS<device B*>(p))))"),
        ("(threadgroup\nA*) p->q(1)[2] * 3", "(AS<threadgroup\nA*>( p->q(1)[2])) * 3"),
        ("void f(device T*);", "void f(device T*);"),
        ("void f(const device T* x, uint y) { g(x); }", "void f(const device T* x, uint y) { g(x); }"),
    ],
)
def test_casts_become_calls(text, casts):
    assert checked_casts(text) == casts.replace("AS<", "metal_cpu::cast<")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_every_kernel_compiles_at_the_sizes_of_the_26b(dtype):
    """They are run, with the same checks, at small sizes: these only compile."""
    texts = {generated(*launch).text for launch in launches(dtype, 1)}
    assert len(texts) > 10
    for text in texts:
        check(text)
