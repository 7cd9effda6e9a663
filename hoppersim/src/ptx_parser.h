// State of the PTX parser: symbols by scope, the function being built. Implementation in ptx.cpp and ptx_operands.cpp.
#pragma once

#include <set>

#include "core.h"

namespace hoppersim {

struct Symbol {
  enum class Kind { reg, predicate, shared, external_shared, local, parameter, global } kind = Kind::reg;
  uint64_t value = 0;  // register or predicate number, offset, address
  Type type = Type::none;
};

struct RegisterRange {  // %r<10>
  std::string prefix;
  uint32_t count = 0, first = 0, words = 1;
  bool predicate = false;
  Type type = Type::none;
};

struct LabelUse {
  size_t instruction;
  size_t operand;
  int element;  // of a vector of labels, -1: the operand itself
  std::string name;
  int line;
};

struct Scope {
  std::unordered_map<std::string, Symbol> symbols;
  std::vector<RegisterRange> ranges;
  std::unordered_map<std::string, uint32_t> labels;
  std::unordered_map<std::string, std::vector<std::string>> tables;
  std::vector<LabelUse> uses;
  bool callee = false;  // body of an expanded call: `ret` leaves it
};

// A shared variable at module level becomes part of each function that names it.
struct SharedVariable {
  uint32_t size = 0, align = 1;
  bool external = false;
};

struct Callee {
  std::vector<std::string> results, arguments;
  size_t body = 0;  // position after '{', 0: declared only
  int line = 0;
};

class PtxParser {
 public:
  explicit PtxParser(const std::string& text);
  std::unique_ptr<Module> parse();
  std::unique_ptr<Function> parse_kernel(const std::string& name, const Module& loaded);

 private:
  struct Variable {
    std::string name;
    Type type = Type::none;
    uint32_t align = 0;
    uint64_t count = 1;  // elements, times vector width
    bool range = false, array = false, unsized = false;
    uint64_t bytes() const { return count * bits_of(type) / 8; }
  };

  [[noreturn]] void syntax(const std::string& text) const;
  [[noreturn]] void not_modelled(const std::string& text) const;
  // Text.
  void skip_space();
  bool at_end();
  bool accept(const char* token);
  void expect(const char* token);
  std::string word();
  std::string until(const char* stops);
  void skip_line();
  void skip_block();
  // Module level.
  void directive();
  void variable(const std::string& space, bool external);
  void initialiser(const Variable& variable, VariableBytes& bytes);
  void entry();
  void function_declaration();
  std::vector<Variable> parameter_list();
  Variable declaration();
  // Bodies.
  void body(int stop_depth);
  void statement();
  template <class Parse>
  bool attempt(Parse parse);
  void body_directive();
  void declare_registers();
  void declare_local();
  void declare_shared(const Variable& variable, bool external);
  void open_scope() { scopes_.emplace_back(); }
  void close_scope();
  void finish_function();
  void instruction(std::string text);
  void call(const std::string& text, int guard, bool guard_negated);
  void emit(Instruction&& instruction);
  void resolve_external(Operand& operand, uint32_t offset);
  // Operands (ptx_operands.cpp).
  Operand operand(const std::string& text, Instruction& into, size_t position);
  Operand address(const std::string& text, Instruction& into, size_t position);
  Operand name(const std::string& text);
  bool number(const std::string& text, Operand& into) const;
  bool find(const std::string& name, Operand& into);
  const Symbol* find_symbol(const std::string& name);
  void label_operand(const std::string& text, Operand& into, size_t position);

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  std::unique_ptr<Module> module_;
  std::unique_ptr<Function> function_;
  std::shared_ptr<SourceLines> lines_;
  int source_ = -1;  // place of the statements being read
  int caller_ = -1;  // place of the call being expanded
  std::vector<Scope> scopes_;
  std::unordered_map<std::string, Symbol> globals_;
  std::unordered_map<std::string, SharedVariable> shared_;
  std::unordered_map<std::string, Callee> callees_;
  std::set<std::string> external_;  // external shared names the function uses
  uint32_t external_align_ = 16;
  std::vector<std::string> calls_;  // that are being expanded
  std::string only_;                // parse_kernel: other entries are passed over
  const Module* loaded_ = nullptr;  // parse_kernel: where the variables are
};

Type type_named(const std::string& name);
std::vector<std::string> split_list(const std::string& text, char separator = ',');
std::string trimmed(const std::string& text);

}  // namespace hoppersim
