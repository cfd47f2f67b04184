// Atomics: threads take turns on one processor, so plain operations on memory are atomic. Metal has relaxed order only.
#pragma once
#include "math.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T stored; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

template <class P> inline auto atomic_load_explicit(P p, memory_order) { return metal_cpu::value_of(p->stored); }
template <class P, class T> inline void atomic_store_explicit(P p, T x, memory_order) { p->stored = x; }

#define ATOMIC(name, expression)                    \
  template <class P, class T>                       \
  inline auto name(P p, T x, memory_order) {        \
    const auto a = metal_cpu::value_of(p->stored);  \
    const decltype(metal_cpu::value_of(a)) b = x;   \
    p->stored = expression;                         \
    return a;                                       \
  }
ATOMIC(atomic_exchange_explicit, b)
ATOMIC(atomic_fetch_add_explicit, a + b)
ATOMIC(atomic_fetch_sub_explicit, a - b)
ATOMIC(atomic_fetch_max_explicit, max(a, b))
ATOMIC(atomic_fetch_min_explicit, min(a, b))
ATOMIC(atomic_fetch_and_explicit, a & b)
ATOMIC(atomic_fetch_or_explicit, a | b)
ATOMIC(atomic_fetch_xor_explicit, a ^ b)
#undef ATOMIC

template <class P, class E, class T>
inline bool atomic_compare_exchange_weak_explicit(P p, E* expected, T wanted, memory_order, memory_order) {
  const auto found = metal_cpu::value_of(p->stored);
  const bool same = found == *expected;
  if (same) p->stored = wanted;
  else *expected = found;
  return same;
}
}  // namespace metal
