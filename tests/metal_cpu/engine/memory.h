// Memory that a kernel cannot leave: every buffer ends where pages that cannot be touched begin, and starts shortly
// after such.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace metal_cpu {
constexpr size_t PAGE = 4096, ALIGNED = 16, GUARD = 16ul << 20;  // ALIGNED: what loads of four floats need

// Pages between two guards. Inputs are seen through a second, read-only view of the same pages.
struct Pages {
  char *write, *seen;
  size_t bytes;
  bool read_only, used;
};

static char* reserve(size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* all = (char*)mmap(nullptr, GUARD + bytes + GUARD, PROT_NONE, flags, -1, 0);
  if (all == MAP_FAILED) abort();
  return all + GUARD;
}
static char* show(char* where, size_t bytes, int rights, int file) {
  if (bytes && mmap(where, bytes, rights, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) abort();
  return where;
}
static Pages fresh_pages(size_t bytes, bool read_only) {
  const int file = memfd_create("metal_cpu", 0);
  if (file < 0 || ftruncate(file, (off_t)bytes)) abort();
  Pages pages = {nullptr, nullptr, bytes, read_only, true};
  pages.seen = show(reserve(bytes), bytes, read_only ? PROT_READ : PROT_READ | PROT_WRITE, file);
  pages.write = read_only ? show(reserve(bytes), bytes, PROT_READ | PROT_WRITE, file) : pages.seen;
  close(file);
  return pages;
}
static void unmap(const Pages& pages) {
  munmap(pages.seen - GUARD, GUARD + pages.bytes + GUARD);
  if (pages.read_only) munmap(pages.write - GUARD, GUARD + pages.bytes + GUARD);
}

// Kept from launch to launch: the same shapes come again and again, and mapping costs more than a small kernel.
constexpr int KEPT = 128;
constexpr size_t KEPT_BYTES = 4ul << 20;  // larger ones are given back at once
static Pages kept[KEPT];

static Pages* take_pages(size_t bytes, bool read_only) {
  static int oldest = 0;
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  for (Pages& pages : kept)
    if (pages.seen && !pages.used && pages.bytes == bytes && pages.read_only == read_only) {
      pages.used = true;
      return &pages;
    }
  for (int tried = 0; tried < KEPT; tried++) {
    Pages& pages = kept[oldest = (oldest + 1) % KEPT];
    if (pages.used) continue;
    if (pages.seen) unmap(pages);
    pages = fresh_pages(bytes, read_only);
    return &pages;
  }
  abort();  // launch() refuses so many buffers
}
static void give_back(Pages* pages) {
  pages->used = false;
  if (pages->bytes <= KEPT_BYTES) return;
  unmap(*pages);
  *pages = {};
}

// `bytes` at the end of `pages`; what is left before and behind them is filled with `poison`.
struct Room {
  Pages* pages;
  size_t bytes, before;
  char* seen() const { return pages->seen + before; }
  char* write() const { return pages->write + before; }
  size_t behind() const { return pages->bytes - before - bytes; }
};
static Room take(size_t bytes, bool read_only, int poison) {
  Pages* pages = take_pages(bytes, read_only);
  const Room room = {pages, bytes, (pages->bytes - bytes) & ~(ALIGNED - 1)};
  memset(pages->write, poison, room.before);
  memset(room.write() + bytes, poison, room.behind());
  return room;
}
static bool all_are(const char* bytes, size_t n, int value) {
  unsigned char different = 0;
  for (size_t i = 0; i < n; i++) different |= (unsigned char)bytes[i] ^ value;
  return !different;
}
// Whether the poison around it is as it was.
static bool intact(const Room& room, int poison) {
  return all_are(room.pages->seen, room.before, poison) && all_are(room.seen() + room.bytes, room.behind(), poison);
}
}  // namespace metal_cpu
