// Pointers are told apart by address space, as in Metal: one to device memory is none to threadgroup memory.
#pragma once
#include "atomics.h"
#include "types.h"

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

namespace metal_cpu {
template <class T> struct Pointer;
#define SPACE(space, number)                  \
  template <class T> struct Pointer<space T*> { \
    typedef T type;                           \
    static constexpr int in = number;         \
  };
SPACE(thread, 0) SPACE(device, 1) SPACE(constant, 2) SPACE(threadgroup, 3)
#undef SPACE

template <class T> struct Bare { typedef T type; };
template <class T> struct Bare<const T> { typedef T type; };
template <class T> constexpr bool is_struct = __is_class(T);
template <class T> constexpr bool is_struct<metal::atomic<T>> = false;  // is used through pointers only

// What *p is where p was cast to a pointer to a struct in an address space: clang copies objects of classes from and to
// its own only. It is copied whole, to or from a variable or another place; fields are found by p->field. All else that
// Metal would take is refused, `auto x = *p` too.
template <class P>
struct Place {
  typedef typename Pointer<P>::type T;
  typedef typename Bare<T>::type S;
  P place;
  Place(P p) : place(p) {}
  Place(const Place&) = delete;
  operator S() const { return *(const S*)place; }
  void operator=(const S& s) const { *(T*)place = s; }
  void operator=(const Place& other) const { *(T*)place = S(other); }
};
template <class P>
struct StructPointer {
  P p;
  operator P() const { return p; }
  P operator->() const { return p; }
  template <class I> StructPointer operator+(I i) const { return {p + i}; }
  Place<P> operator*() const { return {p}; }
  template <class I> Place<P> operator[](I i) const { return {p + i}; }
};

// (device T*)p, as translate.py writes it: the address space stays.
template <bool> struct As { template <class To> using type = To; };
template <> struct As<true> { template <class To> using type = StructPointer<To>; };
template <class To, class From>
inline auto cast(From from) {
  typedef Pointer<To> Wanted;
  static_assert(Wanted::in == Pointer<From>::in, "a cast cannot change the address space");
  typedef typename As<is_struct<typename Bare<typename Wanted::type>::type> && Wanted::in != 0>::template type<To> Made;
  return Made{(To)from};
}

// A variable of a threadgroup. Structs, for the reason above, lie in no address space.
template <class T, bool> struct Shared { typedef threadgroup T type; };
template <class T> struct Shared<T, true> { typedef T type; };
template <class T> using shared = typename Shared<T, is_struct<T>>::type;
}  // namespace metal_cpu
