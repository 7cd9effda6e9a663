// fp32 and fp64 arithmetic. Basic operations, fma, div, rcp and sqrt with a rounding modifier are exact; the .approx
// ones are computed in double and rounded to nearest, which is closer to the truth than the device's.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <type_traits>

#include "core_apply.h"
#include "core_formats.h"

namespace hoppersim {

namespace {

enum Op : uint32_t {
  add_,
  sub_,
  mul_,
  fma_,
  div_,
  min_,
  max_,
  abs_,
  neg_,
  rcp_,
  sqrt_,
  rsqrt_,
  ex2_,
  lg2_,
  sin_,
  cos_,
  tanh_,
  copysign_
};
enum Flag : uint32_t { flush = 1, saturate = 2, keep_nan = 4, bits_only = 8 };

// Keeps the compiler from moving arithmetic across a change of the rounding mode.
template <class T>
void pin(T* values) {
  asm volatile("" : : "r"(values) : "memory");
}

template <class T>
T smaller(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a < b ? b : a;
}

template <class T>
T flushed(T x) {
  return std::abs(x) < std::numeric_limits<T>::min() ? std::copysign(T(0), x) : x;
}
template <class T>
T canonical(T x) {
  if constexpr (sizeof(T) == 4) {
    if (x != x) return from_bits<float>(0x7fffffff);
  }
  return x;
}

template <class T>
T special(uint32_t op, T a) {
  const double x = a;
  switch (op) {
    case rsqrt_: return static_cast<T>(1.0 / std::sqrt(x));
    case ex2_: return static_cast<T>(std::exp2(x));
    case lg2_: return static_cast<T>(std::log2(x));
    case sin_: return static_cast<T>(std::sin(x));
    case cos_: return static_cast<T>(std::cos(x));
    case tanh_: return static_cast<T>(std::tanh(x));
    default: return a;
  }
}

template <class T>
void compute(uint32_t op, const T* a, const T* b, const T* c, T* d, bool nan) {
#define EACH(expression)                                \
  for (int k = 0; k < kLanes; ++k) d[k] = (expression); \
  break
  switch (op) {
    case add_: EACH(a[k] + b[k]);
    case sub_: EACH(a[k] - b[k]);
    case mul_: EACH(a[k] * b[k]);
    case fma_: EACH(std::fma(a[k], b[k], c[k]));
    case div_: EACH(a[k] / b[k]);
    case min_: EACH(nan && (a[k] != a[k] || b[k] != b[k]) ? a[k] + b[k] : smaller(a[k], b[k]));
    case max_: EACH(nan && (a[k] != a[k] || b[k] != b[k]) ? a[k] + b[k] : larger(a[k], b[k]));
    case abs_: EACH(std::abs(a[k]));
    case neg_: EACH(-a[k]);
    case rcp_: EACH(T(1) / a[k]);
    case sqrt_: EACH(std::sqrt(a[k]));
    case copysign_: EACH(std::copysign(b[k], a[k]));
    default: EACH(special(op, a[k]));
  }
#undef EACH
}

// data[0]: Op, data[1]: Rounding, data[2]: Flag
template <class T>
bool execute(Warp& warp, const Instruction& i, uint32_t mask) {
  T a[kLanes], b[kLanes] = {}, c[kLanes] = {}, d[kLanes];
  const uint32_t flags = i.data[2];
  load(warp, i.operands[1], a);
  if (i.operands.size() > 2) load(warp, i.operands[2], b);
  if (i.operands.size() > 3) load(warp, i.operands[3], c);
  if (flags & flush) {
    for (T* values : {a, b, c}) std::transform(values, values + kLanes, values, flushed<T>);
  }
  static constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  if (i.data[1] != 0) std::fesetround(modes[i.data[1]]);
  pin(a), pin(b), pin(c), pin(d);
  compute(i.data[0], a, b, c, d, flags & keep_nan);
  pin(d);
  if (i.data[1] != 0) std::fesetround(FE_TONEAREST);
  for (int k = 0; k < kLanes; ++k) {
    if (flags & flush) d[k] = flushed(d[k]);
    if (flags & saturate) d[k] = d[k] > 0 ? std::min<T>(d[k], 1) : T(0);
    if (!(flags & bits_only)) d[k] = canonical(d[k]);
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 give the upper 32 bits only.
bool execute_upper(Warp& warp, const Instruction& i, uint32_t mask) {
  double a[kLanes];
  load(warp, i.operands[1], a);
  for (double& x : a) {
    x = flushed(x);
    x = flushed(i.data[0] == rcp_ ? 1 / x : 1 / std::sqrt(x));
    if (std::isfinite(x)) x = from_bits<double>(to_bits(x) & 0xffffffff00000000ull);
  }
  store(warp, i.operands[0], a, mask);
  return true;
}

bool test_property(Warp& warp, const Instruction& i, uint32_t mask) {
  double values[kLanes];
  if (i.type == Type::f32) {
    float narrow[kLanes];
    load(warp, i.operands[1], narrow);
    std::copy(narrow, narrow + kLanes, values);
  } else {
    load(warp, i.operands[1], values);
  }
  uint32_t result = 0;
  const double smallest = i.type == Type::f32 ? std::numeric_limits<float>::min() : std::numeric_limits<double>::min();
  for (int lane = 0; lane < kLanes; ++lane) {
    const double x = values[lane];
    const bool nan = x != x, infinite = std::isinf(x), tiny = x != 0 && std::abs(x) < smallest;
    const bool holds = i.has("finite")       ? !nan && !infinite
                       : i.has("infinite")   ? infinite
                       : i.has("number")     ? !nan
                       : i.has("notanumber") ? nan
                       : i.has("subnormal")  ? tiny
                                             : !nan && !infinite && !tiny && x != 0;
    result |= uint32_t(holds) << lane;
  }
  uint32_t& target = warp.predicates[i.operands[0].index];
  target = (target & ~mask) | (result & mask);
  return true;
}

struct Name {
  const char* opcode;
  Op op;
  size_t operands;
};
constexpr Name kNames[] = {{"add", add_, 3},     {"sub", sub_, 3},   {"mul", mul_, 3},          {"fma", fma_, 4},
                           {"mad", fma_, 4},     {"div", div_, 3},   {"min", min_, 3},          {"max", max_, 3},
                           {"abs", abs_, 2},     {"neg", neg_, 2},   {"rcp", rcp_, 2},          {"sqrt", sqrt_, 2},
                           {"rsqrt", rsqrt_, 2}, {"ex2", ex2_, 2},   {"lg2", lg2_, 2},          {"sin", sin_, 2},
                           {"cos", cos_, 2},     {"tanh", tanh_, 2}, {"copysign", copysign_, 3}};

}  // namespace

bool bind_float(Instruction& i) {
  if (i.type != Type::f32 && i.type != Type::f64) return false;
  if (i.opcode == "testp")
    return take(i, test_property, 2, {"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  for (const Name& name : kNames) {
    if (i.opcode != name.opcode) continue;
    i.data[0] = name.op;
    i.data[1] = static_cast<uint32_t>(i.has("rz")   ? Rounding::zero
                                      : i.has("rm") ? Rounding::down
                                      : i.has("rp") ? Rounding::up
                                                    : Rounding::nearest);
    i.data[2] = (i.has("ftz") ? uint32_t(flush) : 0) | (i.has("sat") ? uint32_t(saturate) : 0) |
                (i.has("NaN") ? uint32_t(keep_nan) : 0) |
                (name.op == abs_ || name.op == neg_ || name.op == copysign_ ? uint32_t(bits_only) : 0);
    const bool upper = i.type == Type::f64 && i.has("approx");
    if (upper && (!i.has("ftz") || (name.op != rcp_ && name.op != rsqrt_))) unsupported(i);
    const Execute how = upper ? execute_upper : i.type == Type::f32 ? execute<float> : execute<double>;
    return take(i, how, name.operands, {"rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "NaN"});
  }
  return false;
}

}  // namespace hoppersim
