// 8 x 8 matrices spread over the lanes of a simdgroup, two neighbours of a row each: the layout that MLX's own kernels
// assume (steel/gemm/mma.h). Products are sums of fused multiply-adds in float, in ascending order.
#pragma once
#include "engine.h"

namespace metal_cpu {
inline uint row_of(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline uint column_of(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }  // and the next

template <class A, class B, class C> struct Factors { A a[2]; B b[2]; C c[2]; };
template <class D> struct Pair { D d[2]; };

struct MultiplyAccumulate {
  template <class A, class B, class C, class D>
  static void all(const Factors<A, B, C>* given, Pair<D>* got, uint present) {
    typedef float Row __attribute__((vector_size(32), aligned(32)));
    if (present != ~0u) metal_cpu_fail("a simdgroup_matrix needs all 32 lanes");
    float a[8][8];
    Row b[8], sum[8];
    for (uint lane = 0; lane < LANES; lane++)
      for (uint k = 0; k < 2; k++) {
        const uint row = row_of(lane), column = column_of(lane) + k;
        a[row][column] = float(given[lane].a[k]);
        b[row][column] = float(given[lane].b[k]);
        sum[row][column] = float(given[lane].c[k]);
      }
    for (uint row = 0; row < 8; row++)
      for (uint i = 0; i < 8; i++) sum[row] = __builtin_elementwise_fma(Row{} + a[row][i], b[i], sum[row]);
    for (uint lane = 0; lane < LANES; lane++)
      for (uint k = 0; k < 2; k++) got[lane].d[k] = D(sum[row_of(lane)][column_of(lane) + k]);
  }
};
}  // namespace metal_cpu

namespace metal {
template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8 x 8 matrices only");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    const uint row = metal_cpu::row_of(metal_cpu_engine.lane), column = metal_cpu::column_of(metal_cpu_engine.lane);
    for (uint k = 0; k < 2; k++) elements[k] = row == column + k ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements = vec<T, 2>{x, x};
  return m;
}
template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, Columns, Rows>(x);
}

// Element k of this lane, at `origin` (x: column, y: row) of a matrix whose rows lie `stride` elements apart.
inline ulong simdgroup_element(uint k, ulong stride, ulong2 origin, bool transposed) {
  const uint lane = metal_cpu_engine.lane;
  const ulong row = metal_cpu::row_of(lane), column = metal_cpu::column_of(lane) + k;
  return (origin.y + (transposed ? column : row)) * stride + origin.x + (transposed ? row : column);
}
template <class T, class Pointer>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, Pointer from, ulong stride = 8, ulong2 origin = ulong2{0, 0},
                           bool transposed = false) {
  static_assert(is_same_v<decltype(metal_cpu::value_of(from[0])), T>, "Metal converts nothing here");
  for (uint k = 0; k < 2; k++) m.elements[k] = from[simdgroup_element(k, stride, origin, transposed)];
}
template <class T, class Pointer>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, Pointer to, ulong stride = 8, ulong2 origin = ulong2{0, 0},
                            bool transposed = false) {
  static_assert(is_same_v<decltype(metal_cpu::value_of(to[0])), T>, "Metal converts nothing here");
  for (uint k = 0; k < 2; k++) to[simdgroup_element(k, stride, origin, transposed)] = m.elements[k];
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, PLACE) {
  const metal_cpu::Factors<A, B, C> factors = {
      {a.elements[0], a.elements[1]}, {b.elements[0], b.elements[1]}, {c.elements[0], c.elements[1]}};
  const auto pair = metal_cpu::together<metal_cpu::MultiplyAccumulate, metal_cpu::Pair<D>>(factors, place);
  d.elements = vec<D, 2>{pair.d[0], pair.d[1]};
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                               PLACE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), place);
}
}  // namespace metal
