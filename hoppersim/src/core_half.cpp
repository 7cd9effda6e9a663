// f16, f16x2, bf16, bf16x2 arithmetic. Sums and products are computed in double (exact or rounded to odd), then rounded
// once.
#include <cmath>

#include "core_apply.h"
#include "core_formats.h"

namespace hoppersim {

namespace {

enum Op : uint32_t { add_, sub_, mul_, fma_, min_, max_, abs_, neg_, ex2_, tanh_ };
enum Flag : uint32_t { flush = 1, saturate = 2, keep_nan = 4, relu = 8 };

double pick(bool low, double a, double b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) == low ? a : b;
  return (a < b) == low ? a : b;
}

double operation(uint32_t op, double a, double b, double c, bool nan) {
  switch (op) {
    case add_: return a + b;  // at most 8 + 24 (f16: 41) bits apart: see half()
    case sub_: return a - b;
    case mul_: return a * b;
    case fma_: return fma_to_odd(a, b, c);
    case min_:
    case max_: return nan && (a != a || b != b) ? a + b : pick(op == min_, a, b);
    case ex2_: return std::exp2(a);
    default: return std::tanh(a);
  }
}

double tiny_to_zero(double x, const Format& f) {
  const double smallest = decode(1u << f.mantissa_bits, f);
  return std::abs(x) < smallest ? std::copysign(0.0, x) : x;
}

uint32_t half(const Instruction& i, uint32_t a, uint32_t b, uint32_t c, const Format& f) {
  const uint32_t op = i.data[0], flags = i.data[2];
  if (op == abs_ || op == neg_) {
    uint32_t bits = op == abs_ ? a & 0x7fff : a ^ 0x8000;
    if (flags & flush) bits = encode(tiny_to_zero(decode(bits, f), f), f, Rounding::nearest);
    return bits;
  }
  double x = decode(a, f), y = decode(b, f), z = decode(c, f);
  if (flags & flush) x = tiny_to_zero(x, f), y = tiny_to_zero(y, f), z = tiny_to_zero(z, f);
  // A sum of bf16 numbers far apart is inexact in double: to odd, like fma.
  double r = op == add_   ? fma_to_odd(x, 1, y)
             : op == sub_ ? fma_to_odd(x, 1, -y)
                          : operation(op, x, y, z, flags & keep_nan);
  uint32_t bits = encode(r, f, Rounding::nearest);
  r = decode(bits, f);
  if (flags & flush) r = tiny_to_zero(r, f);
  if (flags & saturate) r = r > 0 ? std::min(r, 1.0) : 0.0;
  if (flags & relu && !(r != r)) r = r > 0 ? r : 0.0;
  return encode(r, f, Rounding::nearest);
}

bool execute(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t a[kLanes], b[kLanes] = {}, c[kLanes] = {}, d[kLanes] = {};
  load(warp, i.operands[1], a);
  if (i.operands.size() > 2) load(warp, i.operands[2], b);
  if (i.operands.size() > 3) load(warp, i.operands[3], c);
  const Format& f = i.data[1] ? kBf16 : kF16;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    d[lane] = half(i, a[lane] & 0xffff, b[lane] & 0xffff, c[lane] & 0xffff, f);
    if (i.data[3]) d[lane] |= half(i, a[lane] >> 16, b[lane] >> 16, c[lane] >> 16, f) << 16;
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

struct Name {
  const char* opcode;
  Op op;
  size_t operands;
};
constexpr Name kNames[] = {{"add", add_, 3}, {"sub", sub_, 3}, {"mul", mul_, 3}, {"fma", fma_, 4}, {"min", min_, 3},
                           {"max", max_, 3}, {"abs", abs_, 2}, {"neg", neg_, 2}, {"ex2", ex2_, 2}, {"tanh", tanh_, 2}};

}  // namespace

bool bind_half(Instruction& i) {
  const bool bf16 = i.type == Type::bf16 || i.type == Type::bf16x2,
             packed = i.type == Type::f16x2 || i.type == Type::bf16x2;
  if (!bf16 && i.type != Type::f16 && i.type != Type::f16x2) return false;
  for (const Name& name : kNames) {
    if (i.opcode != name.opcode) continue;
    i.data[0] = name.op;
    i.data[1] = bf16;
    i.data[2] = (i.has("ftz") ? uint32_t(flush) : 0) | (i.has("sat") ? uint32_t(saturate) : 0) |
                (i.has("NaN") ? uint32_t(keep_nan) : 0) | (i.has("relu") ? uint32_t(relu) : 0);
    i.data[3] = packed;
    return take(i, execute, name.operands, {"rn", "ftz", "sat", "approx", "NaN", "relu"});
  }
  return false;
}

}  // namespace hoppersim
