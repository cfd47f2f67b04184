// metal:: arithmetic on scalars and, element by element, on vectors. Accuracy is that of the C library.
#pragma once
#include "types.h"

namespace metal {
template <class T> struct numeric_limits;
#define FLOATING(T, largest, smallest, step)                          \
  template <> struct numeric_limits<T> {                              \
    static constexpr T infinity() { return T(__builtin_inff()); }     \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }  \
    static constexpr T max() { return T(largest); }                   \
    static constexpr T lowest() { return T(-largest); }               \
    static constexpr T min() { return T(smallest); }                  \
    static constexpr T epsilon() { return T(step); }                  \
  };
FLOATING(float, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
FLOATING(half, 65504.0f, 6.103515625e-05f, 0x1p-10f)
FLOATING(bfloat, 0x1.FEp127f, __FLT_MIN__, 0x1p-7f)
#undef FLOATING
#define INTEGER(T, smallest, largest)                 \
  template <> struct numeric_limits<T> {              \
    static constexpr T max() { return largest; }      \
    static constexpr T min() { return smallest; }     \
    static constexpr T lowest() { return smallest; }  \
  };
INTEGER(char, -128, 127)
INTEGER(short, -32768, 32767)
INTEGER(int, -2147483647 - 1, 2147483647)
INTEGER(long, -0x7FFFFFFFFFFFFFFF - 1, 0x7FFFFFFFFFFFFFFF)
INTEGER(uchar, 0, 255)
INTEGER(ushort, 0, 65535)
INTEGER(uint, 0, 0xFFFFFFFFu)
INTEGER(ulong, 0, 0xFFFFFFFFFFFFFFFFul)
#undef INTEGER

// Halves and bfloats are computed in float and rounded once.
#define FUNCTION(name, expression)                                            \
  inline float name(float x) { return expression; }                           \
  inline half name(half narrow) { return half(name(float(narrow))); }         \
  inline bfloat name(bfloat narrow) { return bfloat(name(float(narrow))); }   \
  template <class T, int N>                                                   \
  inline vec<T, N> name(vec<T, N> v) {                                        \
    for (int i = 0; i < N; i++) v[i] = name(T(v[i]));                         \
    return v;                                                                 \
  }
FUNCTION(exp, __builtin_expf(x))
FUNCTION(exp2, __builtin_exp2f(x))
FUNCTION(log, __builtin_logf(x))
FUNCTION(log2, __builtin_log2f(x))
FUNCTION(log10, __builtin_log10f(x))
FUNCTION(tanh, __builtin_tanhf(x))
FUNCTION(sqrt, __builtin_sqrtf(x))
FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))
FUNCTION(sin, __builtin_sinf(x))
FUNCTION(cos, __builtin_cosf(x))
namespace precise {
using metal::cos, metal::exp, metal::exp2, metal::log, metal::log10, metal::log2;
using metal::rsqrt, metal::sin, metal::sqrt, metal::tanh;
}  // namespace precise
namespace fast = precise;
FUNCTION(floor, __builtin_floorf(x))
FUNCTION(ceil, __builtin_ceilf(x))
FUNCTION(rint, __builtin_rintf(x))
FUNCTION(round, __builtin_roundf(x))
FUNCTION(trunc, __builtin_truncf(x))
FUNCTION(fabs, __builtin_fabsf(x))
#undef FUNCTION

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline float divide(float x, float y) { return x / y; }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a[i] = T(fma(float(a[i]), float(b[i]), float(c[i])));
  return a;
}

// Of a number and a NaN, Metal's max and min are the number.
template <class T> inline T max(T a, T b) { return a != a ? b : (b != b ? a : (a < b ? b : a)); }
template <class T> inline T min(T a, T b) { return a != a ? b : (b != b ? a : (b < a ? b : a)); }
inline float fmax(float a, float b) { return max(a, b); }
inline float fmin(float a, float b) { return min(a, b); }
template <class T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, class C> inline T select(T a, T b, C condition) { return condition ? b : a; }
template <class T> inline T abs(T x) { return x < T(0) ? T(-x) : x; }

inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline ulong popcount(ulong x) { return ulong(__builtin_popcountl(x)); }
inline uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32; }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32; }
template <class T>
inline T rotate(T x, T by) {
  constexpr uint bits = sizeof(T) * 8;
  const uint n = uint(by) % bits;
  return n ? T(x << n | x >> (bits - n)) : x;
}
template <class V>
inline auto dot(V a, V b) {
  auto sum = metal_cpu::value_of(a[0] * b[0]);
  for (int i = 1; i < metal_cpu::elements<V>; i++) sum += a[i] * b[i];
  return sum;
}
template <class To, class From> inline To as_type(From x) { return __builtin_bit_cast(To, x); }
}  // namespace metal
