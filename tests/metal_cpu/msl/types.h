// The types of the Metal Shading Language. No C or C++ header is included: what Metal lacks must not compile here.
#pragma once

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;

// the names that MLX's text uses
typedef half float16_t;
typedef bfloat bfloat16_t;

// A support routine of clang that libgcc 12 lacks: float to bfloat, to the nearest, ties to even.
extern "C" __attribute__((weak)) bfloat __truncsfbf2(float x) {
  uint bits = __builtin_bit_cast(uint, x);
  const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  bits = nan ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_bit_cast(bfloat, ushort(bits >> 16));
}

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

template <class A, class B> constexpr bool is_same_v = false;
template <class A> constexpr bool is_same_v<A, A> = true;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y> struct conditional { typedef X type; };
template <class X, class Y> struct conditional<false, X, Y> { typedef Y type; };
template <bool B, class X, class Y> using conditional_t = typename conditional<B, X, Y>::type;
}  // namespace metal

#define VECTORS(T)              \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
VECTORS(float) VECTORS(half) VECTORS(bfloat)
VECTORS(char) VECTORS(short) VECTORS(int) VECTORS(long)
VECTORS(uchar) VECTORS(ushort) VECTORS(uint) VECTORS(ulong)
#undef VECTORS

namespace metal_cpu {
// Scalars count as vectors of one; the address space of an lvalue is dropped.
template <class T> T value_of(T x) { return x; }
template <class T> constexpr int elements = 1;
template <class T, int N> constexpr int elements<metal::vec<T, N>> = N;

// float4(a, b.xy, c): clang has neither this nor conversions of elements for its vectors; words.h makes it a macro.
template <class V, class... Parts>
inline V vector(Parts... parts) {
  typedef decltype(value_of(V{}[0])) T;
  V v;
  if constexpr (sizeof...(Parts) == 1 && (elements<Parts> + ...) == 1) {
    v = V((T(parts), ...));
  } else {
    static_assert((elements<Parts> + ...) == elements<V>, "a vector is made of exactly as many elements as it has");
    int i = 0;
    auto put = [&](auto part) {
      if constexpr (elements<decltype(part)> == 1) {
        v[i++] = T(part);
      } else {
        for (int k = 0; k < elements<decltype(part)>; k++) v[i++] = T(part[k]);
      }
    };
    (put(parts), ...);
  }
  return v;
}
}  // namespace metal_cpu
