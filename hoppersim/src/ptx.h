// PTX text -> functions of decoded instructions.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "source_lines.h"

namespace hoppersim {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  tf32,
  f32,
  f64
};
constexpr int bits_of(Type type) {
  switch (type) {
    case Type::none: return 32;
    case Type::pred: return 1;
    case Type::b8:
    case Type::u8:
    case Type::s8: return 8;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16: return 16;
    case Type::b32:
    case Type::u32:
    case Type::s32:
    case Type::f16x2:
    case Type::bf16x2:
    case Type::tf32:
    case Type::f32: return 32;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64: return 64;
    case Type::b128: return 128;
  }
  return 32;
}

struct Operand {
  enum class Kind : uint8_t { none, reg, predicate, immediate, address, vector, symbol, special, label, sink /* _ */ };
  Kind kind = Kind::none;
  bool negated = false;    // !p
  uint32_t index = 0;      // register: first word in Warp::registers / kLanes; predicate number; label: pc; special: id
  Type type = Type::none;  // declared type of the register
  uint64_t immediate = 0;  // bits; address: byte offset (two's complement)
  int base = -1;           // address: index into `elements` of the base register, -1: absolute or symbol
  std::string name;        // as written (symbols, specials, reports)
  std::vector<Operand>
      elements;  // vector {a, b, …}; address: the base register if any, then tensor coordinates; `a|b`: b
  Space space = Space::generic;  // symbol, or address without base register: the space its symbol lives in
};

struct Instruction {
  int line = 0;                        // in the PTX text
  int source = -1;                     // place in Function::lines, -1: not known
  std::string text;                    // as written, for reports
  std::string opcode;                  // first part: "wgmma", "ld", "add", …
  std::vector<std::string> modifiers;  // the rest, in order: "mma_async", "sync", "aligned", "m64n128k16", "f32", …
  int guard = -1;                      // predicate register, -1: none
  bool guard_negated = false;
  std::vector<Operand> operands;
  Type type = Type::none;  // last type modifier
  bool has(const char* modifier) const;
  // Executes the instruction for the lanes in `mask` (guard applied). Returns false when the warp must stay at this pc
  // and try again (it has set state, waiting_for and can_resume).
  bool (*execute)(Warp&, const Instruction&, uint32_t mask) = nullptr;
  uint32_t data[4] = {};        // decoded by the unit that owns `execute`
  uint16_t counter_class = 0;   // index into counter_class_names()
  bool aligned = false;         // .aligned (or bar.sync and its kin): the whole warp must be here together
  const void* extra = nullptr;  // decoded by the unit that owns `execute`; lives as long as the program
  uint32_t pc = 0;              // index into Function::code
  bool read_only = false;       // ld.global.nc
  bool strong = false;          // an access that synchronises on its address: atomic, volatile, relaxed, …
  bool acquires = false;        // … with .acquire or .acq_rel; else only for a fence after it
  bool releases = false;        // … with .release or .acq_rel; else only what a fence before it has released
  uint8_t wgmma_registers = 0;  // set by mark_wgmma_registers (tensor.h): 0 no, 1 touches them, 2 is a mov of them
};

struct Parameter {
  std::string name;
  uint32_t offset, size, align;
};

struct Function {
  std::string name;
  std::string title;                         // the name demangled, for reports
  std::shared_ptr<const SourceLines> lines;  // of the module
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t register_words = 0;  // per lane
  uint32_t predicate_count = 0;
  uint32_t static_shared = 0, local_bytes = 0;
  bool external_shared = false;
  uint32_t shared_begin = kSharedBase;       // kReservedForKernels when it names %reserved_smem_offset_…
  uint32_t min_ctas = 0, max_registers = 0;  // .minnctapersm, .maxnreg; 0: not declared
  bool stores_bulk = false;                  // the copy engine writes global memory
  bool loads_read_only = false;              // ld.global.nc
  bool polls = false;                        // a strong access that does not acquire or release: barriers are fences
  bool loads_bulk = false;                   // a copy engine's read of global memory: the global writes are remembered
  uint32_t max_threads = 0, cluster_x = 0, cluster_y = 0, cluster_z = 0;
  std::unordered_map<std::string, uint32_t> shared_symbols;  // name -> offset
  std::vector<Instruction> code;
  std::optional<Fault> problem;  // the first statement that is not modelled or malformed: a launch throws it
};

// Bytes of a variable, aligned as far as one may ask for.
constexpr size_t kVariableAlignment = 256;
template <class T>
struct VariableAllocator {
  using value_type = T;
  VariableAllocator() = default;
  template <class U>
  VariableAllocator(const VariableAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kVariableAlignment})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{kVariableAlignment}); }
  bool operator==(const VariableAllocator&) const { return true; }
};
using VariableBytes = std::vector<uint8_t, VariableAllocator<uint8_t>>;

struct Module {
  std::unordered_map<std::string, std::unique_ptr<Function>> functions;
  std::unordered_map<std::string, VariableBytes> globals;  // .global and .const variables
  std::vector<std::shared_ptr<void>> registrations;        // keeps their ranges registered
};

// Values of operands for every unit (core.cpp). An address includes its base register, its offset and, for a shared
// symbol, the window of the CTA: shared addresses are rank * kRankStride + offset everywhere, as on the device
// (shared_place splits).
uint64_t address_of(const Warp& warp, const Operand& address, int lane);
void addresses_of(const Warp& warp, const Operand& address, uint64_t* addresses);  // of every lane
uint64_t operand_value(const Warp& warp, const Operand& operand,
                       int lane);  // register, immediate, symbol, special, predicate (0/1)
void set_register(Warp& warp, const Operand& reg, int lane, uint64_t bits);  // register, predicate or sink
uint32_t predicate_mask(const Warp& warp, const Operand& predicate);         // with negation; immediate: all or nothing
std::vector<std::string>& counter_class_names();
// Whether the instructions of a class do something for others; false where they only look and compute, and for
// "control".
bool class_progresses(const std::string& name);

// Throws Fault("unsupported instruction" | "ptx syntax", …) naming text and line. What is wrong in the body of a kernel
// is the kernel's `problem`, and the other kernels can be launched.
std::unique_ptr<Module> parse_ptx(const std::string& text);

// One kernel of a changed text of a module that is loaded: its variables are those of `module`.
std::unique_ptr<Function> parse_kernel(const std::string& text, const std::string& name, const Module& module);

// Each unit offers: fills `execute` (and `data`) if the instruction is its own, else returns false. parse_ptx asks them
// in this order; an instruction that none takes is an error of the kernel.
bool bind_core(Instruction& instruction);   // alu, control, plain memory, bar, atomics, shuffles, fences  (core*.cpp)
bool bind_async(Instruction& instruction);  // mbarrier, cp.async*, clusters' remote arrive, griddepcontrol (async*.cpp)
bool bind_tensor(Instruction& instruction);  // wgmma, mma, ldmatrix, stmatrix  (tensor*.cpp)

}  // namespace hoppersim
