// setp, set, selp, slct.
#include "core_apply.h"
#include "core_formats.h"

namespace hoppersim {

namespace {

enum Comparison : uint32_t { eq_, ne_, lt_, le_, gt_, ge_, equ_, neu_, ltu_, leu_, gtu_, geu_, num_, nan_, count_ };
constexpr const char* kComparisons[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                        "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
enum Join : uint32_t { plain, and_, or_, xor_ };

template <class T>
uint32_t compare(uint32_t how, const T* a, const T* b) {
  uint32_t result = 0;
#define EACH(expression)                                                \
  for (int k = 0; k < kLanes; ++k) result |= uint32_t(expression) << k; \
  break
  switch (how) {
    case eq_: EACH(a[k] == b[k]);
    case ne_: EACH(a[k] < b[k] || a[k] > b[k]);
    case lt_: EACH(a[k] < b[k]);
    case le_: EACH(a[k] <= b[k]);
    case gt_: EACH(a[k] > b[k]);
    case ge_: EACH(a[k] >= b[k]);
    case equ_: EACH(!(a[k] < b[k] || a[k] > b[k]));
    case neu_: EACH(a[k] != b[k]);
    case ltu_: EACH(!(a[k] >= b[k]));
    case leu_: EACH(!(a[k] > b[k]));
    case gtu_: EACH(!(a[k] <= b[k]));
    case geu_: EACH(!(a[k] < b[k]));
    case num_: EACH(a[k] == a[k] && b[k] == b[k]);
    default: EACH(a[k] != a[k] || b[k] != b[k]);
  }
#undef EACH
  return result;
}

template <class T>
uint32_t compared(Warp& warp, const Instruction& i) {
  T a[kLanes], b[kLanes];
  const size_t first = i.opcode == "slct" ? 3 : 1;
  load(warp, i.operands[first], a);
  load(warp, i.operands[first + 1], b);
  return compare(i.data[0], a, b);
}

// One half of a packed or single 16-bit number, as float.
uint32_t compared_half(Warp& warp, const Instruction& i, bool high) {
  uint32_t a[kLanes], b[kLanes];
  float x[kLanes], y[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  const Format& f = i.type == Type::bf16 || i.type == Type::bf16x2 ? kBf16 : kF16;
  for (int lane = 0; lane < kLanes; ++lane) {
    x[lane] = static_cast<float>(decode(a[lane] >> (high ? 16 : 0) & 0xffff, f));
    y[lane] = static_cast<float>(decode(b[lane] >> (high ? 16 : 0) & 0xffff, f));
  }
  return compare(i.data[0], x, y);
}

uint32_t compared_flushed(Warp& warp, const Instruction& i) {
  float a[kLanes], b[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  for (float* values : {a, b}) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (std::abs(values[lane]) < std::numeric_limits<float>::min()) values[lane] = 0;
    }
  }
  return compare(i.data[0], a, b);
}

uint32_t result_of(Warp& warp, const Instruction& i) {
  switch (i.type) {
    case Type::u16:
    case Type::b16: return compared<uint16_t>(warp, i);
    case Type::s16: return compared<int16_t>(warp, i);
    case Type::u32:
    case Type::b32: return compared<uint32_t>(warp, i);
    case Type::s32: return compared<int32_t>(warp, i);
    case Type::u64:
    case Type::b64: return compared<uint64_t>(warp, i);
    case Type::s64: return compared<int64_t>(warp, i);
    case Type::f32: return i.has("ftz") ? compared_flushed(warp, i) : compared<float>(warp, i);
    case Type::f64: return compared<double>(warp, i);
    default: return compared_half(warp, i, false);
  }
}

uint32_t joined(Warp& warp, const Instruction& i, uint32_t result) {
  if (i.data[1] == plain) return result;
  const uint32_t other = predicate_mask(warp, i.operands[3]);
  return i.data[1] == and_ ? result & other : i.data[1] == or_ ? result | other : result ^ other;
}

void put(Warp& warp, const Operand& target, uint32_t result, uint32_t mask) {
  if (target.kind != Operand::Kind::predicate) return;  // sink
  uint32_t& bits = warp.predicates[target.index];
  bits = (bits & ~mask) | (result & mask);
}

// p|q: q is the joined complement, or the upper half of a packed comparison.
bool set_predicate(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t result = result_of(warp, i);
  const bool packed = i.type == Type::f16x2 || i.type == Type::bf16x2;
  const Operand& target = i.operands[0];
  const uint32_t first = joined(warp, i, result);
  if (!target.elements.empty())
    put(warp, target.elements[0], joined(warp, i, packed ? compared_half(warp, i, true) : ~result), mask);
  put(warp, target, first, mask);
  return true;
}

bool set_register_to(Warp& warp, const Instruction& i, uint32_t mask) {  // data[2]: value for true
  const uint32_t result = joined(warp, i, result_of(warp, i));
  uint32_t d[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = result >> lane & 1 ? i.data[2] : 0;
  if (i.type == Type::f16x2 || i.type == Type::bf16x2) {
    const uint32_t high = joined(warp, i, compared_half(warp, i, true));
    for (int lane = 0; lane < kLanes; ++lane)
      d[lane] = (d[lane] & 0xffff) | (high >> lane & 1 ? i.data[2] & 0xffff0000 : 0);
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

template <class T>
bool select(Warp& warp, const Instruction& i, uint32_t mask) {
  T a[kLanes], b[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  const uint32_t p = predicate_mask(warp, i.operands[3]);
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = p >> lane & 1 ? a[lane] : b[lane];
  store(warp, i.operands[0], a, mask);
  return true;
}

template <class T, class C>
bool select_by_sign(Warp& warp, const Instruction& i, uint32_t mask) {  // slct
  T a[kLanes], b[kLanes];
  C c[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  load(warp, i.operands[3], c);
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = c[lane] >= 0 ? a[lane] : b[lane];
  store(warp, i.operands[0], a, mask);
  return true;
}

bool bind_select(Instruction& i) {
  if (i.type == Type::f32) return take(i, select<float>, 4);
  if (i.type == Type::f64) return take(i, select<double>, 4);
  return take(i, bits_of(i.type) == 64 ? select<uint64_t> : select<uint32_t>, 4);
}

bool bind_sign_select(Instruction& i) {
  const bool wide =
      i.modifiers[0] == "b64" || i.modifiers[0] == "f64" || i.modifiers[0] == "u64" || i.modifiers[0] == "s64";
  const bool by_float = i.type == Type::f32;
  if (i.has("ftz")) unsupported(i);
  i.execute = wide ? (by_float ? select_by_sign<uint64_t, float> : select_by_sign<uint64_t, int32_t>)
                   : (by_float ? select_by_sign<uint32_t, float> : select_by_sign<uint32_t, int32_t>);
  return true;
}

}  // namespace

bool bind_compare(Instruction& i) {
  if (i.opcode == "selp") return bind_select(i);
  if (i.opcode == "slct") return bind_sign_select(i);
  if ((i.opcode != "setp" && i.opcode != "set") || i.modifiers.empty()) return false;
  i.data[0] = count_;
  const bool is_unsigned = i.type == Type::u16 || i.type == Type::u32 || i.type == Type::u64;
  for (uint32_t k = 0; k < count_; ++k) {
    if (i.modifiers[0] == kComparisons[k]) i.data[0] = k;
  }
  static const std::pair<const char*, Comparison> unsigned_names[] = {
      {"lo", lt_}, {"ls", le_}, {"hi", gt_}, {"hs", ge_}};
  for (const auto& [name, how] : unsigned_names) {
    if (i.modifiers[0] == name && is_unsigned) i.data[0] = how;
  }
  if (i.data[0] == count_) unsupported(i, "comparison " + i.modifiers[0]);
  i.data[1] = i.has("and") ? and_ : i.has("or") ? or_ : i.has("xor") ? xor_ : plain;
  const size_t operands = i.data[1] == plain ? 3 : 4;
  if (i.opcode == "setp")
    return take(i, set_predicate, operands,
                {kComparisons[i.data[0] % count_], i.modifiers[0].c_str(), "and", "or", "xor", "ftz"});
  const std::string target = i.modifiers[i.modifiers.size() - 2];
  i.data[2] = target == "f32"      ? 0x3f800000
              : target == "f16"    ? 0x3c00
              : target == "f16x2"  ? 0x3c003c00
              : target == "bf16"   ? 0x3f80
              : target == "bf16x2" ? 0x3f803f80
                                   : kAll;
  return take(i, set_register_to, operands, {i.modifiers[0].c_str(), target.c_str(), "and", "or", "xor", "ftz"});
}

}  // namespace hoppersim
