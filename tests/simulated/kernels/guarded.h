// Launchers for callers that speak C.
#pragma once

#include <cstdio>
#include <exception>

namespace jet::hopper::test {

// Runs `body`: 0, or 1 with the error's text in `message` (512 bytes).
template <class Body>
int guarded(char* message, Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, 512, "%s", error.what());
    return 1;
  }
}

}  // namespace jet::hopper::test
