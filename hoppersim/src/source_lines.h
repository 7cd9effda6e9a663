// Lines of the CUDA source: the .file and .loc directives that nvcc's -lineinfo puts into a PTX text.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace hoppersim {

class SourceLines {
 public:
  // Finds the .file directives: nvcc writes them behind the functions.
  explicit SourceLines(const std::string& ptx);
  // The text behind a .loc: "1 7 3" or "1 3 3, function_name $L__info_string0, inlined_at 1 8 3". Returns the number of
  // the place. `caller`: the place of the call that is being expanded, -1: none.
  int add(const std::string& loc, int caller);
  // "/home/me/gemm.cu:3, inlined at /home/me/gemm.cu:8"; empty for -1.
  std::string text(int place) const;

 private:
  struct Place {
    uint32_t file, line, column;
    int inlined_at;  // another place, -1: none
  };
  std::unordered_map<uint32_t, std::string> files_;
  std::vector<Place> places_;
};

std::string demangled(const std::string& name);  // as c++filt, without the "void" that every kernel returns

}  // namespace hoppersim
