#include "source_lines.h"

#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>

namespace hoppersim {

SourceLines::SourceLines(const std::string& ptx) {
  for (size_t at = ptx.find(".file"); at != std::string::npos; at = ptx.find(".file", at + 1)) {
    unsigned number = 0;
    const size_t open = ptx.find_first_of("\"\n", at);
    if (std::sscanf(ptx.c_str() + at, ".file %u", &number) != 1 || open == std::string::npos || ptx[open] != '"')
      continue;
    const size_t close = ptx.find('"', open + 1);
    if (close != std::string::npos) files_[number] = ptx.substr(open + 1, close - open - 1);
  }
}

int SourceLines::add(const std::string& loc, int caller) {
  Place place{0, 0, 0, caller};
  if (std::sscanf(loc.c_str(), "%u %u %u", &place.file, &place.line, &place.column) != 3 || place.line == 0) return -1;
  const size_t inlined = loc.find("inlined_at");
  if (Place outer{0, 0, 0, caller};
      inlined != std::string::npos &&
      std::sscanf(loc.c_str() + inlined, "inlined_at %u %u %u", &outer.file, &outer.line, &outer.column) == 3) {
    // The place itself came just before, and says where it was inlined in its turn.
    int known = static_cast<int>(places_.size()) - 1;
    auto same = [&](const Place& p) {
      return p.file == outer.file && p.line == outer.line && p.column == outer.column;
    };
    while (known >= 0 && !same(places_[known])) --known;
    if (known < 0) {
      known = static_cast<int>(places_.size());
      places_.push_back(outer);
    }
    place.inlined_at = known;
  }
  places_.push_back(place);
  return static_cast<int>(places_.size()) - 1;
}

std::string SourceLines::text(int place) const {
  std::string result;
  for (; place >= 0; place = places_[place].inlined_at) {
    const Place& p = places_[place];
    const auto file = files_.find(p.file);
    if (!result.empty()) result += ", inlined at ";
    result += (file == files_.end() ? "file " + std::to_string(p.file) : file->second) + ":" + std::to_string(p.line);
  }
  return result;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (status != 0 || text == nullptr) return name;
  std::string result = text;
  std::free(text);
  return result.rfind("void ", 0) == 0 ? result.substr(5) : result;
}

}  // namespace hoppersim
