#include "bindings/backend.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "csrc/cpu/isa.h"
#include "csrc/hopper/device.h"

namespace jet::bindings {

namespace {

// jetkernels.backend_of asks about the call that this thread makes next.
struct Question {
  bool asked = false;
  std::string answer;  // one JSON object; empty: no op has come to its decision
};
thread_local Question question;

struct Answered : std::exception {
  const char* what() const noexcept override { return "backend_of has its answer"; }
};

void answer(int device, std::optional<PlainReason> reason) {
  const char* name = reason ? "plain" : device == kHost ? "cpu" : "hopper";
  const char* detail = reason ? text(*reason) : device == kHost ? cpu::isa_name(cpu::active_isa()) : "sm_90a";
  question.answer = "{\"name\": \"";
  question.answer += name;
  question.answer += "\", \"detail\": \"";
  question.answer += detail;
  question.answer += "\"}";
  throw Answered();
}

bool plain_is_asked_for() {
  static const bool asked = [] {
    const char* backend = std::getenv("JETKERNELS_BACKEND");
    return backend != nullptr && std::strcmp(backend, "plain") == 0;
  }();
  return asked;
}

std::optional<PlainReason> decide(int device, bool has_kernel, bool takes, bool host_takes) {
  if (plain_is_asked_for()) return PlainReason::asked;
  if (device == kHost) return host_takes ? std::nullopt : std::optional(PlainReason::shape);
  if (!has_kernel) return PlainReason::no_kernel_yet;
  if constexpr (kWithCuda) {
    if (hopper::device_properties(device).compute_capability != 90) return PlainReason::not_hopper;
    return takes ? std::nullopt : std::optional(PlainReason::shape);
  }
  return PlainReason::built_without_cuda;
}

}  // namespace

std::optional<PlainReason> plain_reason_without_kernel(int device) {
  const auto reason = decide(device, false, false, true);
  if (question.asked) answer(device, reason);
  return reason;
}

std::optional<PlainReason> plain_reason_of_call(int device, bool takes, bool host_takes) {
  const auto reason = decide(device, true, takes, host_takes);
  if (question.asked) answer(device, reason);
  return reason;
}

}  // namespace jet::bindings

// For jetkernels.backend_of; here, so that every library with these bindings has them.

// From now on the ops that this thread calls end at their decision.
JET_C_FUNCTION void jetkernels_ask_backend() { jet::bindings::question = {.asked = true, .answer = {}}; }

// Ends that. The answer: a JSON object with `name` and `detail`, alive until this thread asks again; null if no op came
// to its decision.
JET_C_FUNCTION const char* jetkernels_backend_asked() {
  jet::bindings::Question& question = jet::bindings::question;
  question.asked = false;
  return question.answer.empty() ? nullptr : question.answer.c_str();
}
