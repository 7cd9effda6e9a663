// PTX text -> Module: directives, declarations, scopes, statements. Calls of .func are expanded in place.
#include <cctype>

#include "ptx_parser.h"
#include "tensor.h"

namespace hoppersim {

namespace {

// Comments become spaces; line breaks stay, so that lines keep their numbers.
std::string without_comments(std::string text) {
  bool quoted = false;
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') quoted = !quoted;
    if (quoted || text[i] != '/') continue;
    if (text[i + 1] == '/') {
      for (; i < text.size() && text[i] != '\n'; ++i) text[i] = ' ';
    } else if (text[i + 1] == '*') {
      size_t end = text.find("*/", i + 2);
      end = end == std::string::npos ? text.size() : end + 2;
      for (; i < end; ++i) {
        if (text[i] != '\n') text[i] = ' ';
      }
    }
  }
  return text;
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

uint32_t round_up(uint64_t value, uint64_t align) { return static_cast<uint32_t>((value + align - 1) / align * align); }

}  // namespace

PtxParser::PtxParser(const std::string& text) : text_(without_comments(text)), module_(std::make_unique<Module>()) {
  text_.resize(std::strlen(text_.c_str()));  // the text in a fat binary ends in zeros
  lines_ = std::make_shared<SourceLines>(text_);
}

void PtxParser::syntax(const std::string& text) const {
  throw Fault("ptx syntax", "line " + std::to_string(line_) + ": " + text);
}

void PtxParser::not_modelled(const std::string& text) const {
  throw Fault("unsupported instruction", "line " + std::to_string(line_) + ": " + text);
}

void PtxParser::skip_space() {
  while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) line_ += text_[at_++] == '\n';
}

bool PtxParser::at_end() {
  skip_space();
  return at_ >= text_.size();
}

bool PtxParser::accept(const char* token) {
  skip_space();
  const size_t length = std::strlen(token);
  if (text_.compare(at_, length, token) != 0) return false;
  if (is_word(token[length - 1]) && at_ + length < text_.size() && is_word(text_[at_ + length]) &&
      text_[at_ + length] != '.')
    return false;
  at_ += length;
  return true;
}

void PtxParser::expect(const char* token) {
  if (!accept(token)) syntax(std::string("expected '") + token + "' at '" + text_.substr(at_, 40) + "'");
}

std::string PtxParser::word() {
  skip_space();
  const size_t begin = at_;
  while (at_ < text_.size() && is_word(text_[at_])) ++at_;
  if (at_ == begin) syntax("expected a word at '" + text_.substr(at_, 40) + "'");
  return text_.substr(begin, at_ - begin);
}

// Text up to one of `stops`, which stays; white space collapsed.
std::string PtxParser::until(const char* stops) {
  std::string result;
  for (; at_ < text_.size() && !std::strchr(stops, text_[at_]); ++at_) {
    const bool space = std::isspace(static_cast<unsigned char>(text_[at_]));
    line_ += text_[at_] == '\n';
    if (!space) {
      result += text_[at_];
    } else if (!result.empty() && result.back() != ' ') {
      result += ' ';
    }
  }
  return trimmed(result);
}

void PtxParser::skip_line() {
  while (at_ < text_.size() && text_[at_] != '\n') ++at_;
}

void PtxParser::skip_block() {
  expect("{");
  for (int depth = 1; depth > 0; ++at_) {
    if (at_ >= text_.size()) syntax("unclosed block");
    depth += (text_[at_] == '{') - (text_[at_] == '}');
    line_ += text_[at_] == '\n';
  }
}

std::unique_ptr<Module> PtxParser::parse() {
  while (!at_end()) directive();
  return std::move(module_);
}

std::unique_ptr<Function> PtxParser::parse_kernel(const std::string& name, const Module& loaded) {
  only_ = name, loaded_ = &loaded;
  while (!at_end()) directive();
  const auto found = module_->functions.find(name);
  if (found == module_->functions.end()) throw Fault("unknown kernel", name);
  return std::move(found->second);
}

void PtxParser::directive() {
  bool external = false;
  while (true) {
    if (accept(".visible") || accept(".weak") || accept(".common")) continue;
    if (!accept(".extern")) break;
    external = true;
  }
  if (accept(".version") || accept(".target") || accept(".address_size") || accept(".file") || accept(".loc")) {
    skip_line();
  } else if (accept(".section")) {
    until("{");
    skip_block();
  } else if (accept(".pragma") || accept(".alias")) {
    until(";");
    expect(";");
  } else if (accept(".entry")) {
    entry();
  } else if (accept(".func")) {
    function_declaration();
  } else if (accept(".global")) {
    variable(".global", external);
  } else if (accept(".const")) {
    variable(".const", external);
  } else if (accept(".shared")) {
    variable(".shared", external);
  } else {
    syntax("unknown directive '" + text_.substr(at_, 40) + "'");
  }
}

std::vector<PtxParser::Variable> PtxParser::parameter_list() {
  std::vector<Variable> list;
  if (!accept("(")) return list;
  while (!accept(")")) {
    if (!accept(".param")) expect(".reg");
    list.push_back(declaration());
    accept(",");
  }
  return list;
}

void PtxParser::entry() {
  function_ = std::make_unique<Function>();
  function_->name = word();
  if (!only_.empty() && function_->name != only_) {
    until("{;");
    if (!accept(";")) skip_block();
    return;
  }
  function_->title = demangled(function_->name);
  function_->lines = lines_;
  source_ = -1;
  scopes_.assign(1, {});
  external_.clear();
  external_align_ = 16;
  for (const Variable& v : parameter_list()) {
    const uint32_t offset = round_up(function_->parameter_bytes, v.align), size = static_cast<uint32_t>(v.bytes());
    function_->parameters.push_back({v.name, offset, size, v.align});
    function_->parameter_bytes = offset + size;
    scopes_[0].symbols[v.name] = {Symbol::Kind::parameter, offset, v.type};
  }
  while (!accept("{")) {
    if (accept(";")) return;  // declaration
    const std::string name = word();
    const std::vector<std::string> numbers = split_list(until(".{"));
    auto at = [&](size_t i) {
      return i < numbers.size() && !numbers[i].empty() ? static_cast<uint32_t>(std::stoul(numbers[i])) : 1u;
    };
    if (name == ".maxntid" || name == ".reqntid") function_->max_threads = at(0) * at(1) * at(2);
    if (name == ".minnctapersm") function_->min_ctas = at(0);
    if (name == ".maxnreg") function_->max_registers = at(0);
    if (name == ".reqnctapercluster")
      function_->cluster_x = at(0), function_->cluster_y = at(1), function_->cluster_z = at(2);
  }
  body(0);
  finish_function();
}

void PtxParser::function_declaration() {
  Callee callee;
  for (const Variable& v : parameter_list()) callee.results.push_back(v.name);
  const std::string name = word();
  for (const Variable& v : parameter_list()) callee.arguments.push_back(v.name);
  const std::string attributes = until(";{");
  skip_space();
  if (text_[at_] == '{') {
    callee.body = at_ + 1;
    callee.line = line_;
    skip_block();
  } else {
    expect(";");
  }
  if (callee.body != 0 || !callees_.count(name)) callees_[name] = callee;
}

// What fails to parse is the function's problem, not the module's; false for that.
template <class Parse>
bool PtxParser::attempt(Parse parse) {
  std::optional<Fault> problem;
  try {
    parse();
    return true;
  } catch (const Fault& fault) {
    problem = fault;
  } catch (const std::logic_error& error) {  // of std::stoul and its kin
    problem.emplace("ptx syntax", "line " + std::to_string(line_) + ": " + error.what());
  }
  if (!function_->problem) function_->problem = problem;
  return false;
}

// Statements until the brace that closes the scope above `stop_depth` scopes.
void PtxParser::body(int stop_depth) {
  while (true) {
    if (at_end()) syntax("unclosed function");
    if (accept("{")) {
      open_scope();
    } else if (accept("}")) {
      if (static_cast<int>(scopes_.size()) == stop_depth + 1) {
        if (scopes_.back().callee) scopes_.back().labels["%return"] = static_cast<uint32_t>(function_->code.size());
        close_scope();
        return;
      }
      close_scope();
    } else {
      statement();
    }
  }
}

void PtxParser::statement() {
  if (accept(";")) return;
  if (text_[at_] == '.') {
    if (!attempt([&] { body_directive(); })) until(";");
    return;
  }
  const size_t begin = at_;
  const int line = line_;
  if (text_[at_] != '@') {
    const std::string name = word();
    skip_space();
    if (at_ < text_.size() && text_[at_] == ':' && text_[at_ + 1] != ':') {
      ++at_;
      if (accept(".branchtargets")) {
        scopes_.back().tables[name] = split_list(until(";"));
        expect(";");
      } else if (accept(".callprototype") || accept(".calltargets")) {
        until(";");
        expect(";");
      } else if (!scopes_.back().labels.emplace(name, function_->code.size()).second) {
        syntax("label " + name + " twice in a scope");
      }
      return;
    }
    at_ = begin;
    line_ = line;
  }
  const std::string text = until(";");
  attempt([&] { instruction(text); });
  expect(";");
}

void PtxParser::body_directive() {
  if (accept(".loc")) {
    source_ = lines_->add(until("\n"), caller_);
  } else if (accept(".file")) {
    skip_line();
  } else if (accept(".pragma")) {
    until(";");
    expect(";");
  } else if (accept(".reg")) {
    declare_registers();
  } else if (accept(".shared")) {
    declare_shared(declaration(), false);
    expect(";");
  } else if (accept(".local")) {
    declare_local();
  } else if (accept(".param")) {
    declare_local();
  } else {
    not_modelled("directive " + until(";"));
  }
}

void PtxParser::declare_registers() {
  const Variable first = declaration();
  if (first.count != 1 && !first.range) not_modelled("vector register " + first.name);
  Variable v = first;
  while (true) {
    RegisterRange range{v.name, static_cast<uint32_t>(v.count), 0, 1, first.type == Type::pred, first.type};
    if (range.predicate) {
      range.first = function_->predicate_count;
      function_->predicate_count += range.count;
    } else {
      range.words = std::max(1, bits_of(range.type) / 32);
      range.first = function_->register_words;
      function_->register_words += range.count * range.words;
    }
    if (v.range) {
      scopes_.back().ranges.push_back(range);
    } else {
      scopes_.back().symbols[v.name] = {range.predicate ? Symbol::Kind::predicate : Symbol::Kind::reg, range.first,
                                        range.type};
    }
    if (!accept(",")) break;
    v = Variable();
    v.name = word();
    if (accept("<")) {
      v.range = true;
      v.count = std::stoull(until(">"));
      expect(">");
    }
  }
  expect(";");
}

// .local variables, and .param variables of calls, which live in local memory too.
void PtxParser::declare_local() {
  const Variable v = declaration();
  expect(";");
  const uint32_t offset = round_up(function_->local_bytes, std::max(v.align, 8u));
  function_->local_bytes = offset + static_cast<uint32_t>(v.bytes());
  scopes_.back().symbols[v.name] = {Symbol::Kind::local, offset, v.type};
}

void PtxParser::declare_shared(const Variable& v, bool external) {
  if (external) {
    external_.insert(v.name);
    external_align_ = std::max(external_align_, v.align);
    function_->external_shared = true;
    function_->shared_symbols[v.name] = 0;
    return;
  }
  const uint32_t offset = round_up(kSharedBase + function_->static_shared, v.align);
  function_->static_shared = offset - kSharedBase + static_cast<uint32_t>(v.bytes());
  function_->shared_symbols[v.name] = offset;
  scopes_.back().symbols[v.name] = {Symbol::Kind::shared, offset, v.type};
}

void PtxParser::close_scope() {
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  if (function_->problem) return;  // instructions are missing, and nothing will run
  for (LabelUse& use : scope.uses) {
    const auto label = scope.labels.find(use.name);
    if (label == scope.labels.end()) {
      if (scopes_.empty() || scope.callee) {
        attempt([&] { throw Fault("ptx syntax", "line " + std::to_string(use.line) + ": no label " + use.name); });
        return;
      }
      scopes_.back().uses.push_back(use);
      continue;
    }
    Operand& operand = function_->code[use.instruction].operands[use.operand];
    (use.element < 0 ? operand : operand.elements[use.element]).index = label->second;
  }
}

void PtxParser::resolve_external(Operand& operand, uint32_t offset) {
  if (operand.space == Space::shared && external_.count(operand.name)) operand.immediate += offset;
  for (Operand& element : operand.elements) resolve_external(element, offset);
}

void PtxParser::finish_function() {
  const uint32_t begin = round_up(kSharedBase + function_->static_shared, external_align_);
  if (function_->external_shared) function_->static_shared = begin - kSharedBase;
  for (const std::string& name : external_) function_->shared_symbols[name] = begin;
  for (Instruction& i : function_->code) {
    for (Operand& operand : i.operands) resolve_external(operand, begin);
  }
  if (function_->problem) function_->code.clear();
  Instruction end;  // falling off the end leaves the kernel
  end.line = line_;
  end.text = end.opcode = "exit";
  emit(std::move(end));
  mark_wgmma_registers(*function_);
  module_->functions[function_->name] = std::move(function_);
}

std::unique_ptr<Module> parse_ptx(const std::string& text) { return PtxParser(text).parse(); }

std::unique_ptr<Function> parse_kernel(const std::string& text, const std::string& name, const Module& module) {
  return PtxParser(text).parse_kernel(name, module);
}

}  // namespace hoppersim
