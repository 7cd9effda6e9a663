// Options of a program that is run unmodified (`hoppersim run`): environment variables, read when its kernels register.
#include <cstdio>
#include <cstdlib>

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

}  // namespace

void read_environment(Options& options, std::string& report_path) {
  with_variable("HOPPERSIM_TIMING", [&](const std::string& value) {
    if (value != "early" && value != "late") refuse("HOPPERSIM_TIMING", value, "early or late");
    options.timing = value == "late" ? Timing::late : Timing::early;
  });
  read_number("HOPPERSIM_SEED", options.seed);
  read_number("HOPPERSIM_MAX_INSTRUCTIONS", options.max_instructions);
  read_number("HOPPERSIM_HOST_THREADS", options.host_threads);
  with_variable("HOPPERSIM_REPORT", [&](const std::string& value) { report_path = value; });
}

}  // namespace hoppersim
