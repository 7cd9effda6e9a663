// What is reported: the kinds, and what a report does to the launch.
#pragma once

#include "machine.h"

namespace hoppersim {

struct Kind {
  const char* name;
  Severity severity;    // unless the options say otherwise
  bool goes_on;         // the machine is in a defined state after it: it may be allowed, and go_on collects it
  const char* meaning;  // one sentence; the README's table is this table
};
const std::vector<Kind>& kinds();

// A hazard after which the machine is in a defined state: throws, keeps or drops it, as the options say.
// For kinds with `goes_on`; those without it are faults (machine.h).
void report(const char* kind, const Warp& warp, const Instruction& instruction, const std::string& text, int lane = -1);

}  // namespace hoppersim
