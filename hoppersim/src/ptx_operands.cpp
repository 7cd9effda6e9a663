// Instructions and operands of PTX text.
#include <algorithm>
#include <cctype>

#include "ptx_parser.h"

namespace hoppersim {

Type type_named(const std::string& name) {
  static const std::unordered_map<std::string, Type> types = {
      {"pred", Type::pred},   {"b8", Type::b8},     {"b16", Type::b16},       {"b32", Type::b32},   {"b64", Type::b64},
      {"b128", Type::b128},   {"u8", Type::u8},     {"u16", Type::u16},       {"u32", Type::u32},   {"u64", Type::u64},
      {"s8", Type::s8},       {"s16", Type::s16},   {"s32", Type::s32},       {"s64", Type::s64},   {"f16", Type::f16},
      {"f16x2", Type::f16x2}, {"bf16", Type::bf16}, {"bf16x2", Type::bf16x2}, {"tf32", Type::tf32}, {"f32", Type::f32},
      {"f64", Type::f64}};
  const auto found = types.find(name);
  return found == types.end() ? Type::none : found->second;
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\n"), end = text.find_last_not_of(" \t\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

// Splits outside brackets of all kinds.
std::vector<std::string> split_list(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '[' || c == '{' || c == '(') - (c == ']' || c == '}' || c == ')');
    if (c == separator && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty() || !parts.empty()) parts.push_back(trimmed(part));
  return parts;
}

bool Instruction::has(const char* modifier) const {
  for (const std::string& m : modifiers) {
    if (m == modifier) return true;
  }
  return false;
}

// Integers become 64 bits with type none; 0f… keeps 32 bits with type f32; 0d… and decimals 64 bits with type f64.
bool PtxParser::number(const std::string& text, Operand& into) const {
  size_t digits = 0;
  const bool negative = text[0] == '-';
  if (negative || text[0] == '+') ++digits;
  if (digits >= text.size() || !(std::isdigit(static_cast<unsigned char>(text[digits])) || text[digits] == '.'))
    return false;
  into.kind = Operand::Kind::immediate;
  into.name = text;
  std::string body = text.substr(digits);
  const char second = body.size() > 1 ? static_cast<char>(std::tolower(body[1])) : ' ';
  if (body[0] == '0' && second == 'f') {
    into.type = Type::f32;
    into.immediate = std::stoull(body.substr(2), nullptr, 16) ^ (negative ? 0x80000000ull : 0);
  } else if (body[0] == '0' && second == 'd') {
    into.type = Type::f64;
    into.immediate = std::stoull(body.substr(2), nullptr, 16) ^ (negative ? 1ull << 63 : 0);
  } else if (second != 'x' && body.find_first_of(".eE") != std::string::npos) {
    into.type = Type::f64;
    const double value = std::stod(body);
    into.immediate = to_bits(negative ? -value : value);
  } else {
    if (body.back() == 'U' || body.back() == 'u') body.pop_back();
    const int base = second == 'b' ? 2 : 0;
    const uint64_t value = std::stoull(base == 2 ? body.substr(2) : body, nullptr, base);
    into.immediate = negative ? -value : value;
  }
  return true;
}

const Symbol* PtxParser::find_symbol(const std::string& name) {
  for (size_t i = scopes_.size(); i-- > 0;) {
    const auto found = scopes_[i].symbols.find(name);
    if (found != scopes_[i].symbols.end()) return &found->second;
  }
  const auto shared = shared_.find(name);
  if (shared != shared_.end() && !external_.count(name)) {
    Variable v;
    v.name = name;
    v.type = Type::b8;
    v.count = shared->second.size;
    v.align = shared->second.align;
    if (shared->second.external) {
      declare_shared(v, true);
    } else {  // the variable belongs to the whole function: declare it in the outermost scope
      const uint32_t offset = (kSharedBase + function_->static_shared + v.align - 1) / v.align * v.align;
      function_->static_shared = offset - kSharedBase + static_cast<uint32_t>(v.bytes());
      function_->shared_symbols[name] = offset;
      return &(scopes_[0].symbols[name] = {Symbol::Kind::shared, offset, Type::b8});
    }
  }
  if (external_.count(name)) return &(scopes_[0].symbols[name] = {Symbol::Kind::external_shared, 0, Type::b8});
  const auto global = globals_.find(name);
  return global == globals_.end() ? nullptr : &global->second;
}

// A register (also of a range) or a variable.
bool PtxParser::find(const std::string& name, Operand& into) {
  into.name = name;
  size_t digits = name.size();
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  for (size_t i = scopes_.size(); i-- > 0;) {
    if (scopes_[i].symbols.count(name)) break;  // an inner name hides outer ranges
    if (digits == name.size() || name.size() - digits > 9) continue;
    const uint32_t number = static_cast<uint32_t>(std::stoul(name.substr(digits)));
    for (const RegisterRange& range : scopes_[i].ranges) {
      if (number >= range.count || name.compare(0, digits, range.prefix) != 0 || range.prefix.size() != digits)
        continue;
      into.kind = range.predicate ? Operand::Kind::predicate : Operand::Kind::reg;
      into.index = range.first + number * range.words;
      into.type = range.type;
      return true;
    }
  }
  const Symbol* symbol = find_symbol(name);
  if (symbol == nullptr) return false;
  into.type = symbol->type;
  into.kind = Operand::Kind::symbol;
  into.immediate = symbol->value;
  switch (symbol->kind) {
    case Symbol::Kind::reg:
    case Symbol::Kind::predicate:
      into.kind = symbol->kind == Symbol::Kind::reg ? Operand::Kind::reg : Operand::Kind::predicate;
      into.index = static_cast<uint32_t>(symbol->value);
      into.immediate = 0;
      break;
    case Symbol::Kind::shared:
    case Symbol::Kind::external_shared: into.space = Space::shared; break;
    case Symbol::Kind::local: into.space = Space::local; break;
    case Symbol::Kind::parameter: into.space = Space::param; break;
    case Symbol::Kind::global: into.space = Space::global; break;
  }
  return true;
}

Operand PtxParser::name(const std::string& text) {
  Operand result;
  if (find(text, result)) return result;
  const int special = special_id(text);
  if (special >= 0) {
    result.kind = Operand::Kind::special;
    result.index = static_cast<uint32_t>(special);
    if (text.rfind("%reserved_smem_offset_", 0) == 0) function_->shared_begin = kReservedForKernels;
    return result;
  }
  not_modelled("unknown name " + text);
}

void PtxParser::label_operand(const std::string& text, Operand& into, size_t position) {
  into.name = text;
  const size_t at = function_->code.size();
  for (size_t i = scopes_.size(); i-- > 0;) {
    const auto table = scopes_[i].tables.find(text);
    if (table == scopes_[i].tables.end()) continue;
    into.kind = Operand::Kind::vector;
    for (size_t k = 0; k < table->second.size(); ++k) {
      Operand target;
      target.kind = Operand::Kind::label;
      target.name = table->second[k];
      into.elements.push_back(target);
      scopes_.back().uses.push_back({at, position, static_cast<int>(k), target.name, line_});
    }
    return;
  }
  into.kind = Operand::Kind::label;
  scopes_.back().uses.push_back({at, position, -1, text, line_});
}

// [base], [base+offset], [symbol+offset], [number]; with coordinates: [base, {c0, c1}] (flattened into elements).
Operand PtxParser::address(const std::string& text, Instruction& into, size_t position) {
  Operand result;
  result.kind = Operand::Kind::address;
  const std::vector<std::string> parts = split_list(text.substr(1, text.size() - 2));
  if (parts.empty()) syntax("empty address in " + into.text);
  std::string base = parts[0];
  uint64_t offset = 0;
  const size_t sign = base.find_first_of("+-", 1);
  if (sign != std::string::npos) {
    Operand value;
    std::string rest = trimmed(base.substr(sign + (base[sign] == '+')));
    std::erase(rest, ' ');
    if (!number(rest, value)) syntax("address " + text);
    offset = value.immediate;
    base = trimmed(base.substr(0, sign));
  }
  result.name = base;
  Operand inner;
  if (number(base, inner)) {
    result.immediate = inner.immediate + offset;
  } else {
    inner = name(base);
    result.immediate = inner.immediate + offset;
    if (inner.kind == Operand::Kind::symbol) {
      result.space = inner.space;
    } else if (inner.kind == Operand::Kind::reg) {
      result.base = 0;
      result.elements.push_back(inner);
    } else {
      syntax("address " + text);
    }
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    const Operand part = operand(parts[i], into, position);
    if (part.kind == Operand::Kind::vector) {
      result.elements.insert(result.elements.end(), part.elements.begin(), part.elements.end());
    } else {
      result.elements.push_back(part);
    }
  }
  return result;
}

Operand PtxParser::operand(const std::string& text, Instruction& into, size_t position) {
  if (text.empty()) syntax("missing operand in " + into.text);
  Operand result;
  result.name = text;
  if (text[0] == '[') return address(text, into, position);
  if (text[0] == '{') {
    result.kind = Operand::Kind::vector;
    for (const std::string& part : split_list(text.substr(1, text.size() - 2)))
      result.elements.push_back(operand(part, into, position));
    return result;
  }
  if (text[0] == '!') {
    result = operand(trimmed(text.substr(1)), into, position);
    result.negated = true;
    return result;
  }
  if (text == "_") {
    result.kind = Operand::Kind::sink;
    return result;
  }
  if (const size_t bar = text.find('|'); bar != std::string::npos) {
    result = operand(trimmed(text.substr(0, bar)), into, position);
    result.elements.push_back(operand(trimmed(text.substr(bar + 1)), into, position));
    return result;
  }
  if (number(text, result)) return result;
  if (const size_t plus = text.find('+'); plus != std::string::npos) {  // symbol+offset
    result = name(trimmed(text.substr(0, plus)));
    Operand offset;
    if (result.kind != Operand::Kind::symbol || !number(trimmed(text.substr(plus + 1)), offset))
      syntax("operand " + text);
    result.immediate += offset.immediate;
    return result;
  }
  return name(text);
}

void PtxParser::instruction(std::string text) {
  Instruction result;
  result.line = line_;
  result.text = text;
  if (text[0] == '@') {
    const size_t end = text.find(' ');
    if (end == std::string::npos) syntax("guard without instruction");
    std::string guard = text.substr(1, end - 1);
    text = trimmed(text.substr(end));
    if (guard[0] == '!') {
      result.guard_negated = true;
      guard = guard.substr(1);
    }
    const Operand predicate = name(guard);
    if (predicate.kind != Operand::Kind::predicate) syntax("guard " + guard);
    result.guard = static_cast<int>(predicate.index);
  }
  const size_t space = text.find_first_of(" [{(");
  const std::vector<std::string> parts = split_list(text.substr(0, space), '.');
  result.opcode = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) {
    result.modifiers.push_back(parts[i]);
    if (const Type type = type_named(parts[i]); type != Type::none) result.type = type;
  }
  const std::string rest = space == std::string::npos ? "" : trimmed(text.substr(space));
  if (result.opcode == "call") {
    call(rest, result.guard, result.guard_negated);
    return;
  }
  const bool branch = result.opcode == "bra" || result.opcode == "brx";
  const std::vector<std::string> operands = split_list(rest);
  for (size_t i = 0; i < operands.size(); ++i) {
    if (branch && i + 1 == operands.size()) {
      result.operands.emplace_back();
      label_operand(operands[i], result.operands.back(), i);
    } else {
      result.operands.push_back(operand(operands[i], result, i));
    }
  }
  if (result.opcode == "ret" && !calls_.empty()) {  // of an expanded call
    result.opcode = "bra";
    result.operands.resize(1);
    label_operand("%return", result.operands[0], 0);
  }
  emit(std::move(result));
}

// (results), name, (arguments): the body of `name` is expanded here with its parameters bound to the caller's.
void PtxParser::call(const std::string& text, int guard, bool guard_negated) {
  std::vector<std::string> parts = split_list(text);
  auto list = [](const std::string& s) {
    return s.size() > 1 && s[0] == '(' ? split_list(s.substr(1, s.size() - 2)) : std::vector<std::string>{};
  };
  std::vector<std::string> results;
  if (!parts.empty() && parts[0][0] == '(') {
    results = list(parts[0]);
    parts.erase(parts.begin());
  }
  const std::vector<std::string> arguments = parts.size() > 1 ? list(parts[1]) : std::vector<std::string>{};
  const auto found = parts.empty() ? callees_.end() : callees_.find(parts[0]);
  if (found == callees_.end() ||
      found->second.body == 0) {  // vprintf, __assertfail, indirect calls: a fault when it executes
    Instruction external;
    external.line = line_;
    external.text = "call " + text;
    external.opcode = "call";
    external.guard = guard;
    external.guard_negated = guard_negated;
    emit(std::move(external));
    return;
  }
  const Callee& callee = found->second;
  if (guard >= 0 || results.size() != callee.results.size() || arguments.size() != callee.arguments.size())
    not_modelled("call " + text);
  if (std::find(calls_.begin(), calls_.end(), found->first) != calls_.end()) not_modelled("recursive call " + text);
  Scope scope;
  scope.callee = true;
  auto bind = [&](const std::vector<std::string>& formal, const std::vector<std::string>& actual) {
    for (size_t i = 0; i < formal.size(); ++i) {
      const Symbol* symbol = find_symbol(actual[i]);
      if (symbol == nullptr || symbol->kind != Symbol::Kind::local) not_modelled("call " + text);
      scope.symbols[formal[i]] = *symbol;
    }
  };
  bind(callee.results, results);
  bind(callee.arguments, arguments);
  const size_t at = at_;
  const int line = line_, source = source_, caller = caller_;
  caller_ = source_;
  at_ = callee.body;
  line_ = callee.line;
  scopes_.push_back(std::move(scope));
  calls_.push_back(found->first);
  body(static_cast<int>(scopes_.size()) - 1);
  calls_.pop_back();
  source_ = source, caller_ = caller;
  at_ = at;
  line_ = line;
}

}  // namespace hoppersim
