// Running one threadgroup. Its threads take turns: a thread runs until it ends or waits for others, then the next one
// of its simdgroup does. When all lanes of a simdgroup have stopped, they must have stopped at the same place: at an
// operation of the simdgroup, which is done once for all, or at a barrier, after which the next simdgroup runs.
#pragma once
#include "../msl/engine.h"
#include "fibers.h"
#include "order.h"

namespace metal_cpu {
typedef void (*Body)(void** buffers, const Thread& thread);
constexpr uint MOST_THREADS = 1024;  // of a threadgroup
constexpr uint NONE = ~0u;

enum State : unsigned char { FRESH, RUNNING, TOGETHER, BARRIER, ENDED };
struct Lane {
  Fiber* fiber;
  State state;
  int place;         // where it waits: line * 10000 + column of the kernel's text
  const void* from;  // and in the code: a function with a barrier may be called at two places
  Combine combine;
};

static Thread threads[MOST_THREADS];
static Lane lanes[MOST_THREADS];
static Fiber fibers[MOST_THREADS];
static Fiber* idle[MOST_THREADS];  // fibers without a thread
static uint idle_count;
static uint count, current;         // threads of this threadgroup; the one that runs
static uint simdgroups, groups[MOST_THREADS / LANES], group_turn;  // in the order of this phase, and whose turn it is
static uint places[LANES], turn;    // lanes in the order of this round
static Order order;
static Body body;
static void** buffers;
static Context main_context;

[[noreturn]] static void fail(const char* what, int first = 0, int second = 0);

static uint lanes_of(uint group) { return count - group * LANES < LANES ? count - group * LANES : LANES; }

static void start_round() {
  order.fill(places, lanes_of(groups[group_turn]));
  turn = NONE;
}
static void start_phase() {
  order.fill(groups, simdgroups);
  group_turn = 0;
  start_round();
}

static bool same_place(const Lane& a, const Lane& b) {
  return a.state == b.state && a.place == b.place && a.from == b.from;
}

// All lanes of the simdgroup have stopped. True if they go on within it.
static bool finish_round() {
  const uint first = groups[group_turn] * LANES, n = lanes_of(groups[group_turn]);
  for (current = first; current < first + n; current++) {
    const Lane &lane = lanes[current], &other = lanes[first];
    if (same_place(lane, other)) continue;
    const bool barrier = lane.state == BARRIER || other.state == BARRIER;
    fail(barrier ? "a barrier is not reached by all threads" : "divergent operation of a simdgroup", other.place,
         lane.place);
  }
  current = first;
  const Lane& lane = lanes[first];
  if (lane.state != TOGETHER) return false;
  if (lane.combine) lane.combine(n == LANES ? ~0u : (1u << n) - 1);
  start_round();
  return true;
}

// All simdgroups have stopped. True if they go on, behind a barrier.
static bool finish_phase() {
  for (current = 0; current < count; current += LANES) {
    const Lane &lane = lanes[current], &other = lanes[0];
    if (lane.state != other.state) fail("a barrier is not reached by all threads", other.place, lane.place);
    if (!same_place(lane, other)) fail("threads wait at different barriers", other.place, lane.place);
  }
  if (lanes[0].state == ENDED) return false;
  start_phase();
  return true;
}

// The thread that runs next, or NONE when all have ended.
static uint next() {
  for (;;) {
    const uint group = groups[group_turn];
    if (++turn < lanes_of(group)) return group * LANES + places[turn];
    if (finish_round()) continue;
    if (++group_turn < simdgroups) start_round();
    else if (!finish_phase()) return NONE;
  }
}

static void run_threads();

static void take_turn(uint thread) {
  current = thread;
  metal_cpu_engine.lane = thread % LANES;
}
static void leave(Context& here, uint to) {
  take_turn(to);
  Lane& lane = lanes[to];
  if (!lane.fiber) lane.fiber = idle[--idle_count];
  switch_to(here, *lane.fiber, run_threads);
}

// The work of a fiber: threads, one after the other, each as a rule without having waited.
static void run_threads() {
  for (;;) {
    Fiber* const fiber = lanes[current].fiber;
    lanes[current].state = RUNNING;
    body(buffers, threads[current]);
    lanes[current] = {fiber, ENDED, 0, nullptr, nullptr};
    const uint then = next();
    if (then != NONE && lanes[then].state == FRESH) {
      take_turn(then);
      lanes[then].fiber = fiber;
      continue;
    }
    idle[idle_count++] = fiber;
    if (then == NONE) switch_from(fiber->context, main_context);
    else leave(fiber->context, then);
  }
}

// The thread that runs waits; returns when it may go on.
static void wait(State state, int place, const void* from, Combine combine) {
  Lane& lane = lanes[current];
  lane = {lane.fiber, state, place, from, combine};
  const uint self = current, then = next();
  if (then == self) take_turn(self);
  else leave(lane.fiber->context, then);
}

// Threads [0, count) from beginning to end.
static void run_threadgroup() {
  simdgroups = (count + LANES - 1) / LANES;
  for (uint i = 0; i < count; i++) lanes[i] = {nullptr, FRESH, 0, nullptr, nullptr};
  start_phase();
  leave(main_context, next());
}
static void forget_fibers() {  // what they were doing is lost: after a failure, and before the first launch
  idle_count = MOST_THREADS;
  for (uint i = 0; i < MOST_THREADS; i++) {
    fibers[i].started = false;
    idle[i] = &fibers[MOST_THREADS - 1 - i];
  }
}
}  // namespace metal_cpu
