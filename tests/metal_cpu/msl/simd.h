// Operations of a simdgroup. Lanes that do not exist (the last simdgroup of a threadgroup may be short) take no part;
// what is read from one of them is poison.
#pragma once
#include "engine.h"
#include "math.h"

namespace metal_cpu {
// One result for all, made in the order of lanes. Metal leaves the order open.
template <class Op>
struct Reduce {
  template <class T>
  static void all(const T* given, T* got, uint present) {
    T result = given[0];
    for (uint i = 1; i < LANES; i++)
      if (present >> i & 1) result = Op::of(result, given[i]);
    for (uint i = 0; i < LANES; i++) got[i] = result;
  }
};
struct Sum { template <class T> static T of(T a, T b) { return T(a + b); } };
struct Product { template <class T> static T of(T a, T b) { return T(a * b); } };
struct Max { template <class T> static T of(T a, T b) { return metal::max(a, b); } };
struct Min { template <class T> static T of(T a, T b) { return metal::min(a, b); } };
struct And { template <class T> static T of(T a, T b) { return T(a & b); } };
struct Or { template <class T> static T of(T a, T b) { return T(a | b); } };
struct Xor { template <class T> static T of(T a, T b) { return T(a ^ b); } };

// Every lane names the lane whose value it gets.
template <class T> struct From { T value; uint lane; };
struct Shuffle {
  template <class T>
  static void all(const From<T>* given, T* got, uint present) {
    for (uint i = 0; i < LANES; i++) {
      const uint from = given[i].lane;
      if (!(present >> i & 1)) continue;
      if (from < LANES && present >> from & 1) got[i] = given[from].value;
      else __builtin_memset(&got[i], metal_cpu_engine.poison, sizeof(T));
    }
  }
};
template <class T>
inline T shuffle(T x, uint lane, int place) {
  return together<Shuffle, T>(From<T>{x, lane}, place);
}

template <class Op>
struct Inclusive {
  template <class T>
  static void all(const T* given, T* got, uint) {
    got[0] = given[0];
    for (uint i = 1; i < LANES; i++) got[i] = Op::of(got[i - 1], given[i]);
  }
};
template <class Op, int first>
struct Exclusive {
  template <class T>
  static void all(const T* given, T* got, uint) {
    got[0] = T(first);
    for (uint i = 1; i < LANES; i++) got[i] = Op::of(got[i - 1], given[i - 1]);
  }
};
struct Ballot {
  static void all(const uint* given, ulong* got, uint present) {
    ulong votes = 0;
    for (uint i = 0; i < LANES; i++) votes |= ulong((present >> i & 1) && given[i]) << i;
    for (uint i = 0; i < LANES; i++) got[i] = votes;
  }
};
}  // namespace metal_cpu

namespace metal {
#define REDUCTION(name, Op)                                                    \
  template <class T>                                                           \
  inline T name(T x, PLACE) {                                                  \
    return metal_cpu::together<metal_cpu::Reduce<metal_cpu::Op>, T>(x, place); \
  }
REDUCTION(simd_sum, Sum)
REDUCTION(simd_product, Product)
REDUCTION(simd_max, Max)
REDUCTION(simd_min, Min)
REDUCTION(simd_and, And)
REDUCTION(simd_or, Or)
REDUCTION(simd_xor, Xor)
#undef REDUCTION
inline bool simd_any(bool x, PLACE) { return simd_or(uint(x), place); }
inline bool simd_all(bool x, PLACE) { return simd_and(uint(x), place); }

class simd_vote {
  ulong votes;

 public:
  typedef ulong vote_t;
  explicit simd_vote(vote_t v) : votes(v) {}
  explicit operator vote_t() const { return votes; }
  bool any() const { return votes != 0; }
};
inline simd_vote simd_ballot(bool x, PLACE) {
  return simd_vote(metal_cpu::together<metal_cpu::Ballot, ulong>(uint(x), place));
}

template <class T> inline T simd_shuffle(T x, ushort lane, PLACE) { return metal_cpu::shuffle(x, lane, place); }
template <class T> inline T simd_broadcast(T x, ushort lane, PLACE) { return metal_cpu::shuffle(x, lane, place); }
template <class T> inline T simd_broadcast_first(T x, PLACE) { return metal_cpu::shuffle(x, 0, place); }
inline bool simd_is_first() { return metal_cpu_engine.lane == 0; }
template <class T>
inline T simd_shuffle_xor(T x, ushort mask, PLACE) {
  return metal_cpu::shuffle(x, metal_cpu_engine.lane ^ mask, place);
}
// the lanes with nothing above, or below, keep their own value
template <class T>
inline T simd_shuffle_down(T x, ushort by, PLACE) {
  const uint lane = metal_cpu_engine.lane;
  return metal_cpu::shuffle(x, lane + by < metal_cpu::LANES ? lane + by : lane, place);
}
template <class T>
inline T simd_shuffle_up(T x, ushort by, PLACE) {
  const uint lane = metal_cpu_engine.lane;
  return metal_cpu::shuffle(x, lane >= by ? lane - by : lane, place);
}
template <class T>
inline T simd_shuffle_rotate_down(T x, ushort by, PLACE) {
  return metal_cpu::shuffle(x, (metal_cpu_engine.lane + by) % metal_cpu::LANES, place);
}
template <class T>
inline T simd_shuffle_rotate_up(T x, ushort by, PLACE) {
  return metal_cpu::shuffle(x, (metal_cpu_engine.lane - by) % metal_cpu::LANES, place);
}

#define PREFIX(name, Kind)                                  \
  template <class T>                                        \
  inline T name(T x, PLACE) {                               \
    return metal_cpu::together<metal_cpu::Kind, T>(x, place); \
  }
PREFIX(simd_prefix_inclusive_sum, Inclusive<metal_cpu::Sum>)
PREFIX(simd_prefix_inclusive_product, Inclusive<metal_cpu::Product>)
#undef PREFIX
template <class T>
inline T simd_prefix_exclusive_sum(T x, PLACE) {
  return metal_cpu::together<metal_cpu::Exclusive<metal_cpu::Sum, 0>, T>(x, place);
}
template <class T>
inline T simd_prefix_exclusive_product(T x, PLACE) {
  return metal_cpu::together<metal_cpu::Exclusive<metal_cpu::Product, 1>, T>(x, place);
}
}  // namespace metal
