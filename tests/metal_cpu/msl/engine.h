// What a kernel knows of the engine that runs it (engine/): which thread it is, how to wait, where shared memory lies.
#pragma once
#include "types.h"

namespace metal_cpu {
constexpr uint LANES = 32;        // threads of a simdgroup
constexpr uint WIDEST = 64;       // bytes that one lane may give to, or get from, the others at once
typedef void (*Combine)(uint present);

// What Metal's [[attributes]] say to one thread.
struct Thread {
  uint3 in_grid, in_threadgroup, group, grid, threads, most_threads, threadgroups;
  uint index, lane, simdgroup, simdgroups;
};

// Shared by all kernels. One simdgroup runs at a time, so one place to exchange values is enough.
struct Engine {
  alignas(64) char given[LANES * WIDEST];
  alignas(64) char got[LANES * WIDEST];
  ulong number;   // of the threadgroup that runs, over all launches
  uint lane;      // of the thread that runs
  int poison;     // the byte that memory nobody wrote is filled with
};

}  // namespace metal_cpu

extern "C" {
extern metal_cpu::Engine metal_cpu_engine;
// No call is merged with an equal one of another branch or, at the end of a function, made a jump: see `from` in
// engine/threadgroup.h.
// Waits until every thread of the threadgroup has reached the same place.
__attribute__((nomerge, not_tail_called)) void metal_cpu_barrier(int place);
// Waits until every lane of the simdgroup has reached the same place; `combine` then runs once, for all of them.
__attribute__((nomerge, not_tail_called)) void metal_cpu_together(int place, metal_cpu::Combine combine);
// Memory of a threadgroup variable, poisoned for this threadgroup, at the end of a page. `which` counts variables.
void* metal_cpu_claim(int which, ulong bytes);
[[noreturn]] void metal_cpu_fail(const char* message);
}

namespace metal_cpu {
// The variable of a declaration `threadgroup T name[N];`: the same memory for all threads of a threadgroup.
template <class T>
inline T& threadgroup_variable(int which, void*& memory, ulong& number) {
  if (number != metal_cpu_engine.number) {
    memory = metal_cpu_claim(which, sizeof(T));
    number = metal_cpu_engine.number;
  }
  return *(T*)memory;
}

// Every lane gives an `In` and gets an `Out`; `Op::all(given, got, present)` makes all of them at once.
template <class Op, class In, class Out>
void combine(uint present) {
  Op::all((const In*)metal_cpu_engine.given, (Out*)metal_cpu_engine.got, present);
}
template <class Op, class Out, class In>
inline Out together(In x, int place) {
  static_assert(sizeof(In) <= WIDEST && sizeof(Out) <= WIDEST);
  ((In*)metal_cpu_engine.given)[metal_cpu_engine.lane] = x;
  metal_cpu_together(place, combine<Op, In, Out>);
  return ((const Out*)metal_cpu_engine.got)[metal_cpu_engine.lane];
}
}  // namespace metal_cpu

// Where a call stands: the last parameter of every function that waits.
#define PLACE int place = __builtin_LINE() * 10000 + __builtin_COLUMN()

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags, PLACE) { metal_cpu_barrier(place); }
inline void simdgroup_barrier(mem_flags, PLACE) { metal_cpu_together(place, nullptr); }
}  // namespace metal
