// The engine's one entry, metal_cpu_launch, and what kernels call. Compiled once, shared by all kernels.
#include <signal.h>
#include <stdio.h>

#include "memory.h"
#include "threadgroup.h"

using namespace metal_cpu;

extern "C" {
Engine metal_cpu_engine;

// One buffer of a call. `kind` 0: an input. 1: an output that starts as poison. 2: an output that starts as given.
struct MetalCpuBuffer {
  void* bytes;
  size_t size;
  int kind;
};
}

namespace metal_cpu {
constexpr int MOST_BUFFERS = 31, MOST_VARIABLES = 31;  // Metal's limit of buffers; one place for each variable
constexpr size_t MOST_THREADGROUP_MEMORY = 32 << 10;
static Room rooms[MOST_BUFFERS], variables[MOST_VARIABLES];
static int claimed[MOST_VARIABLES], claims;  // by the threadgroup that runs
static size_t claimed_bytes;
static char* message;
static bool failed;
constexpr size_t MESSAGE = 512;

static void say(const char* what, int first, int second) {
  const Thread& t = threads[current];
  int n = snprintf(message, MESSAGE, "%s", what);
  const int places[] = {first, second};
  for (const int place : places)
    if (place) n += snprintf(message + n, MESSAGE - n, ", line %d column %d", place / 10000, place % 10000);
  const uint3 at = t.group;
  snprintf(message + n, MESSAGE - n, " [threadgroup %u,%u,%u thread %u]", at.x, at.y, at.z, t.index);
  failed = true;
}
// Leaves the threadgroup that runs, as if it had ended.
static void fail(const char* what, int first, int second) {
  say(what, first, second);
  restore(main_context);
}

// Whether `at` lies in the pages or next to them.
static bool near(const Pages* pages, const char* at) {
  return pages && at >= pages->seen - GUARD && at < pages->seen + pages->bytes + GUARD;
}
static bool within(const Pages* pages, const char* at) { return at >= pages->seen && at < pages->seen + pages->bytes; }

static void on_fault(int, siginfo_t* info, void*) {
  static char what[120];
  const char* at = (const char*)info->si_addr;
  const char* stack = lanes[current].fiber ? lanes[current].fiber->stack : nullptr;
  snprintf(what, sizeof what, "out-of-bounds access (SIGSEGV at %p)", (const void*)at);
  if (stack && at >= stack && at < stack + STACK_GUARD)
    snprintf(what, sizeof what, "more than 128 KiB of variables of one thread");
  for (int i = 0; i < MOST_BUFFERS; i++)
    if (near(rooms[i].pages, at)) {
      const char* form = within(rooms[i].pages, at) ? "write to buffer %d, an input, at byte %ld"
                                                    : "out-of-bounds access of buffer %d at byte %ld";
      snprintf(what, sizeof what, form, i, (long)(at - rooms[i].seen()));
    }
  for (int i = 0; i < claims; i++) {
    const Room& room = variables[claimed[i]];
    const char* form = "out-of-bounds access of threadgroup variable %d at byte %ld";
    if (near(room.pages, at)) snprintf(what, sizeof what, form, claimed[i], (long)(at - room.seen()));
  }
  fail(what);
}

// After a threadgroup: whether the poison around its variables is as it was. The next one finds all poison.
static void check_variables() {
  current = 0;
  for (; claims > 0; claims--)
    if (!failed && !intact(variables[claimed[claims - 1]], metal_cpu_engine.poison))
      say("out-of-bounds write next to a threadgroup variable", 0, 0);
  claimed_bytes = 0;
}
static void give_back(Room& room) {
  if (room.pages) give_back(room.pages);
  room.pages = nullptr;
}

// The threads of the threadgroup `group`, of `size` threads; all but those at the edge have `most`.
static void place_threads(uint3 group, uint3 size, uint3 grid, uint3 most, uint3 groups_of_grid) {
  count = size.x * size.y * size.z;
  for (uint i = 0; i < count; i++) {
    const uint3 in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    threads[i] = {group * most + in_threadgroup, in_threadgroup, group, grid, size, most, groups_of_grid,
                  i, i % LANES, i / LANES, (count + LANES - 1) / LANES};
  }
}

static void run_grid(const uint3 grid, const uint3 most) {
  const uint3 n = (grid + most - 1) / most;
  const uint total = n.x * n.y * n.z;
  static uint* turns;
  static uint held;
  if (total > held) turns = (uint*)realloc(turns, (held = total) * sizeof(uint));
  order.fill(turns, total);
  for (uint i = 0; i < total && !failed; i++) {
    const uint3 at = {turns[i] % n.x, turns[i] / n.x % n.y, turns[i] / n.x / n.y};
    const uint3 rest = grid - at * most;
    metal_cpu_engine.number++;
    place_threads(at, rest < most ? rest : most, grid, most, n);
    run_threadgroup();
    check_variables();
  }
}

struct Handlers {
  struct sigaction segv, bus;
  stack_t stack;
};
static void install(Handlers& before) {
  static char space[64 << 10];  // a stack of its own: the fault may be that the fiber's has ended
  stack_t own = {};
  own.ss_sp = space, own.ss_size = sizeof space;
  sigaltstack(&own, &before.stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before.segv);
  sigaction(SIGBUS, &action, &before.bus);
}
static void uninstall(const Handlers& before) {
  sigaction(SIGSEGV, &before.segv, nullptr);
  sigaction(SIGBUS, &before.bus, nullptr);
  sigaltstack(&before.stack, nullptr);
}

}  // namespace metal_cpu

extern "C" {
void metal_cpu_barrier(int place) { wait(BARRIER, place, __builtin_return_address(0), nullptr); }
void metal_cpu_together(int place, Combine combine) {
  wait(TOGETHER, place, __builtin_return_address(0), combine);
}
void metal_cpu_fail(const char* what) { fail(what); }

// Called by the first thread of a threadgroup that passes the declaration.
void* metal_cpu_claim(int which, ulong bytes) {
  if (which >= MOST_VARIABLES) fail("too many threadgroup variables");
  claimed_bytes += (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
  if (claimed_bytes > MOST_THREADGROUP_MEMORY) fail("more than 32768 bytes of threadgroup memory");
  Room& room = variables[which];
  if (!room.pages) room = take(bytes, false, metal_cpu_engine.poison);
  memset(room.seen(), metal_cpu_engine.poison, bytes);
  claimed[claims++] = which;
  return room.seen();
}

// Runs a kernel over `grid` threads in threadgroups of at most `most`. 0, or 1 with the reason in `reason` (512 bytes).
int metal_cpu_launch(Body kernel, MetalCpuBuffer* given, int n, const uint* grid, const uint* most, uint seed,
                     int poison, char* reason) {
  void* seen[MOST_BUFFERS];
  if (n > MOST_BUFFERS) return snprintf(reason, MESSAGE, "more than %d buffers", MOST_BUFFERS), 1;
  for (int i = 0; i < n; i++) {
    rooms[i] = take(given[i].size, given[i].kind == 0, poison);
    if (given[i].kind == 1) memset(rooms[i].write(), poison, given[i].size);
    else memcpy(rooms[i].write(), given[i].bytes, given[i].size);
    seen[i] = rooms[i].seen();
  }
  static bool begun = false;
  if (!begun) forget_fibers();
  begun = true;
  body = kernel, buffers = seen, message = reason, failed = false, metal_cpu_engine.poison = poison;
  order.set(seed);
  Handlers before;
  install(before);
  run_grid(uint3{grid[0], grid[1], grid[2]}, uint3{most[0], most[1], most[2]});
  uninstall(before);
  if (failed) forget_fibers();
  for (int i = 0; i < n; i++) {
    if (given[i].kind != 0) {
      if (!failed && !intact(rooms[i], poison)) {
        failed = true;
        snprintf(reason, MESSAGE, "out-of-bounds write next to buffer %d", i);
      }
      memcpy(given[i].bytes, rooms[i].seen(), given[i].size);
    }
    give_back(rooms[i]);
  }
  for (Room& room : variables) give_back(room);
  return failed;
}
}
