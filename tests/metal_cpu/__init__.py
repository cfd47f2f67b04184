"""Metal kernels on a CPU, without a Mac. Every result is labelled ``cpu-emulated``.

How: MLX generates the text of a kernel (``text.py``). It becomes C++ (``translate.py``), which clang compiles, with
``msl/`` in the place of Metal's library (``compile.py``). ``engine/`` then runs its threads, each on its own stack,
one at a time: a thread runs until it ends or waits for others at an operation of its simdgroup or at a barrier.
``runner.py`` is the way in.

What it proves, of the very text that Metal would get:

- the arithmetic, on half and bfloat rounded at every operation, against references;
- that no buffer and no threadgroup variable is left: each ends where memory that cannot be touched begins. What starts
  at a multiple of 16 bytes may end up to 15 bytes before that; writes there are found, reads yield poison;
- that nothing is read or returned that nobody wrote: it is filled with poison, another one for every thread order;
- that the result does not depend on the order of threadgroups, simdgroups and lanes between two points where they wait
  (each runs from one such point to the next undisturbed);
- that all threads reach the same barriers and operations of a simdgroup (Metal lets lanes be absent, this does not);
- limits: 1024 threads and 32 KiB of memory per threadgroup, 31 buffers;
- that every pointer and reference names its address space and keeps to it (except that structs in threadgroup memory
  count as a thread's, and that a template's ``thread T&`` takes any), and that the text is C++14, Metal 3's base, and
  C++17, Metal 4's.

What it cannot show: that Apple's compiler takes the text; registers, occupancy and speed; Metal's fast math mode; the
last bits of exp, log and tanh, which are the C library's here; products fused with sums, and the order in which
``simd_sum`` adds, both of which Metal leaves open; a missing ``simdgroup_barrier`` next to another operation of the
simdgroup, where lanes wait for each other here; threadgroups that really run at once, and how real memory orders them.
"""
