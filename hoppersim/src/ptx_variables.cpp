// Declarations of variables, and those of modules with their initial values.
#include "ptx_parser.h"

namespace hoppersim {

// [.align N] [.v2|.v4] .type name[<n>|[n]…], after the state space.
PtxParser::Variable PtxParser::declaration() {
  Variable variable;
  while (true) {
    if (accept(".align")) {
      variable.align = std::stoul(word());
    } else if (accept(".v2")) {
      variable.count *= 2;
    } else if (accept(".v4")) {
      variable.count *= 4;
    } else if (accept(".ptr") || accept(".global") || accept(".shared") || accept(".const") || accept(".local") ||
               accept(".attribute(.managed)") || accept(".relaxed")) {
      continue;
    } else {
      skip_space();
      if (text_[at_] != '.') break;
      const std::string name = word();
      variable.type = type_named(name.substr(1));
      if (variable.type == Type::none) syntax("unknown type or attribute '" + name + "'");
    }
  }
  variable.name = word();
  if (accept("<")) {
    variable.range = true;
    variable.count = std::stoull(until(">"));
    expect(">");
  }
  while (accept("[")) {
    variable.array = true;
    const std::string size = until("]");
    expect("]");
    if (size.empty()) {
      variable.unsized = true;
    } else {
      variable.count *= std::stoull(size);
    }
  }
  if (variable.align == 0 && variable.type != Type::pred) variable.align = std::max(1, bits_of(variable.type) / 8);
  return variable;
}

void PtxParser::variable(const std::string& space, bool external) {
  const Variable v = declaration();
  if (space == ".shared") {
    shared_[v.name] = {static_cast<uint32_t>(v.unsized ? 0 : v.bytes()), v.align, external || v.unsized};
    expect(";");
    return;
  }
  if (loaded_ != nullptr) {
    const auto found = loaded_->globals.find(v.name);
    if (found == loaded_->globals.end()) syntax("variable " + v.name + " is not one of the loaded module");
    globals_[v.name] = {Symbol::Kind::global, reinterpret_cast<uint64_t>(found->second.data())};
    until(";");
    expect(";");
    return;
  }
  if (v.align > kVariableAlignment) not_modelled("alignment of variable " + v.name);
  VariableBytes& bytes = module_->globals[v.name];
  bytes.assign(std::max<uint64_t>(v.unsized ? 0 : v.bytes(), 1), 0);
  if (accept("=")) initialiser(v, bytes);
  expect(";");
  Symbol symbol;
  symbol.kind = Symbol::Kind::global;
  symbol.value = reinterpret_cast<uint64_t>(bytes.data());
  globals_[v.name] = symbol;
  if (external && v.unsized) return;  // defined elsewhere: accesses fault
  const void* begin = bytes.data();
  global_ranges().add(begin, bytes.size(), space == ".global");
  module_->registrations.emplace_back(nullptr, [begin](void*) { global_ranges().remove(begin); });
}

// Numbers and addresses of variables, flat or nested in braces.
void PtxParser::initialiser(const Variable& v, VariableBytes& bytes) {
  std::string list = until(";");
  std::erase_if(list, [](char c) { return c == '{' || c == '}'; });
  const size_t width = bits_of(v.type) / 8;
  size_t at = 0;
  for (const std::string& item : split_list(list)) {
    Operand value;
    if (item.empty()) continue;
    if (!number(item, value)) {
      std::string symbol = item;
      uint64_t offset = 0;
      if (const size_t plus = symbol.rfind('+'); plus != std::string::npos) {
        offset = std::stoull(symbol.substr(plus + 1), nullptr, 0);
        symbol = trimmed(symbol.substr(0, plus));
      }
      if (symbol.rfind("generic(", 0) == 0) symbol = symbol.substr(8, symbol.size() - 9);
      const auto found = globals_.find(symbol);
      if (found == globals_.end() || width != 8) not_modelled("initialiser " + item);
      value.immediate = found->second.value + offset;
    } else if (v.type == Type::f32 && value.type == Type::f64) {
      value.immediate = to_bits(static_cast<float>(from_bits<double>(value.immediate)));
    }
    if (at + width > bytes.size()) syntax("too many initial values for " + v.name);
    std::memcpy(&bytes[at], &value.immediate, width);
    at += width;
  }
}

}  // namespace hoppersim
