// The order in which things run that Metal runs at once: 0 ascending, 1 descending, from 2 on shuffled, anew at every
// turn.
#pragma once
#include <stdint.h>

namespace metal_cpu {
struct Order {
  uint32_t seed, state;

  void set(uint32_t chosen) { seed = chosen, state = chosen * 2654435769u | 1; }
  uint32_t draw() {  // xorshift
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
  }
  void fill(uint32_t* places, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) places[i] = seed == 1 ? n - 1 - i : i;
    if (seed < 2) return;
    for (uint32_t i = n; i > 1; i--) {
      const uint32_t other = draw() % i, kept = places[i - 1];
      places[i - 1] = places[other];
      places[other] = kept;
    }
  }
};
}  // namespace metal_cpu
