// How the CPU code runs loops in parallel without knowing whose threads they are: the caller hands in its own
// parallel-for (the bindings pass torch's, so torch.set_num_threads is obeyed and no second thread pool exists).
#pragma once

#include <cstdint>

namespace jet {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using For = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  For run;
  int64_t threads;

  // body(begin, end) is called on disjoint ranges that cover [begin, end); it must not throw.
  template <class F>
  void operator()(int64_t begin, int64_t end, int64_t grain, const F& body) const {
    if (begin >= end) return;
    run(
        begin, end, grain, [](int64_t b, int64_t e, void* context) { (*static_cast<const F*>(context))(b, e); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace jet
