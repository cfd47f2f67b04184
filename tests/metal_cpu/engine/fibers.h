// Fibers: stacks that a thread of a kernel can be left on and come back to. Switching costs a few nanoseconds.
#pragma once
#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace metal_cpu {
// clang's own pair stores three words; the C library's also the registers, and mangles them
#ifdef __x86_64__
typedef void* Context[5];
#define SAVE(context) __builtin_setjmp(context)
#define RESTORE(context) __builtin_longjmp(context, 1)
#else
typedef jmp_buf Context;
#define SAVE(context) _setjmp(context)
#define RESTORE(context) _longjmp(context, 1)
#endif

[[noreturn]] __attribute__((noinline)) static void restore(Context& context) { RESTORE(context); }
__attribute__((noinline)) static void switch_from(Context& here, Context& there) {
  if (!SAVE(here)) restore(there);
}

constexpr size_t STACK = 128 << 10, STACK_GUARD = 1 << 20;  // bytes

struct Fiber {
  Context context;
  char* stack;
  bool started;
};

// Starts it if it has never run: `entry` must not return.
__attribute__((noinline)) static void switch_to(Context& here, Fiber& fiber, void (*entry)()) {
  if (fiber.started) return switch_from(here, fiber.context);
  fiber.started = true;
  static ucontext_t fresh;
  static uint colour;
  if (!fiber.stack) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    fiber.stack = (char*)mmap(nullptr, STACK_GUARD + STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (fiber.stack == MAP_FAILED || mprotect(fiber.stack, STACK_GUARD, PROT_NONE)) abort();
  }
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = fiber.stack + STACK_GUARD;
  // not all at the same distance from a page: they would compete for the same lines of the cache
  fresh.uc_stack.ss_size = STACK - 64 * (7 * colour++ % 64);
  fresh.uc_link = nullptr;
  makecontext(&fresh, entry, 0);
  if (!SAVE(here)) setcontext(&fresh);
}
}  // namespace metal_cpu
