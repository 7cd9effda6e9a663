// Instructions of the form d = f(a, b, c), lane by lane.
#pragma once

#include "core.h"

namespace hoppersim {

template <class D, class A, D (*F)(A)>
bool apply1(Warp& warp, const Instruction& i, uint32_t mask) {
  A a[kLanes];
  D d[kLanes];
  load(warp, i.operands[1], a);
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = F(a[lane]);
  store(warp, i.operands[0], d, mask);
  return true;
}

template <class D, class A, class B, D (*F)(A, B)>
bool apply2(Warp& warp, const Instruction& i, uint32_t mask) {
  A a[kLanes];
  B b[kLanes];
  D d[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = F(a[lane], b[lane]);
  store(warp, i.operands[0], d, mask);
  return true;
}

template <class D, class A, class B, class C, D (*F)(A, B, C)>
bool apply3(Warp& warp, const Instruction& i, uint32_t mask) {
  A a[kLanes];
  B b[kLanes];
  C c[kLanes];
  D d[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  load(warp, i.operands[3], c);
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = F(a[lane], b[lane], c[lane]);
  store(warp, i.operands[0], d, mask);
  return true;
}

// All operands of one type.
template <class T, T (*F)(T)>
constexpr Execute one = apply1<T, T, F>;
template <class T, T (*F)(T, T)>
constexpr Execute two = apply2<T, T, T, F>;
template <class T, T (*F)(T, T, T)>
constexpr Execute three = apply3<T, T, T, T, F>;

// Takes the instruction with `execute` if its operands are as many; modifiers outside `known` are unsupported.
bool take(Instruction& instruction, Execute execute, size_t operands, std::initializer_list<const char*> known = {});

}  // namespace hoppersim
