// Options of a program that is run unmodified (`hoppersim run`): environment variables, read when its kernels register.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "report.h"
#include "runtime.h"

namespace hoppersim {

namespace {

[[noreturn]] void refuse(const char* variable, const std::string& value, const char* wanted) {
  std::fprintf(stderr, "hoppersim: %s must be %s, it is \"%s\"\n", variable, wanted, value.c_str());
  std::_Exit(2);
}

template <class Use>
void with_variable(const char* variable, Use use) {
  if (const char* value = std::getenv(variable); value != nullptr && *value != '\0') use(std::string(value));
}

template <class Number>
void read_number(const char* variable, Number& into) {
  with_variable(variable, [&](const std::string& value) {
    char* end = nullptr;
    const unsigned long long number = std::strtoull(value.c_str(), &end, 10);
    if (*end != '\0' || value[0] == '-') refuse(variable, value, "a number");
    into = static_cast<Number>(number);
  });
}

void read_switch(const char* variable, bool& into) {
  with_variable(variable, [&](const std::string& value) {
    if (value != "0" && value != "1") refuse(variable, value, "0 or 1");
    into = value == "1";
  });
}

// Kinds with a comma between them.
void read_allowed(const char* variable, std::vector<std::string>& into) {
  with_variable(variable, [&](const std::string& value) {
    for (size_t at = 0, end = 0; end != std::string::npos; at = end + 1) {
      end = value.find(',', at);
      const std::string name = value.substr(at, end - at);
      const bool known = std::any_of(kinds().begin(), kinds().end(),
                                     [&](const Kind& kind) { return kind.name == name && kind.goes_on; });
      if (!known) refuse(variable, value, "kinds of reports after which a launch can go on");
      into.push_back(name);
    }
  });
}

}  // namespace

void read_environment(Options& options, std::string& report_path) {
  with_variable("HOPPERSIM_TIMING", [&](const std::string& value) {
    if (value != "early" && value != "late") refuse("HOPPERSIM_TIMING", value, "early or late");
    options.timing = value == "late" ? Timing::late : Timing::early;
  });
  read_number("HOPPERSIM_SEED", options.seed);
  read_number("HOPPERSIM_MAX_INSTRUCTIONS", options.max_instructions);
  read_number("HOPPERSIM_HOST_THREADS", options.host_threads);
  read_allowed("HOPPERSIM_ALLOW", options.allow);
  read_switch("HOPPERSIM_STRICT", options.strict);
  read_switch("HOPPERSIM_GO_ON", options.go_on);
  with_variable("HOPPERSIM_REPORT", [&](const std::string& value) { report_path = value; });
}

}  // namespace hoppersim
