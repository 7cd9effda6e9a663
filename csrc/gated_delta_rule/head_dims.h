// The query/key head dims K that the Hopper kernels of the gated delta rule are compiled for: the one list of them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace jet {

template <int... dims>
struct HeadDims {
  static constexpr int most = [] {
    int most = 0;
    ((most = dims > most ? dims : most), ...);
    return most;
  }();

  static constexpr bool has(int64_t K) { return ((K == dims) || ...); }

  // f(K) for each, as std::integral_constant: for proofs
  template <class F>
  static constexpr bool all(const F& f) {
    return (f(std::integral_constant<int, dims>()) && ...);
  }

  // f(K), as std::integral_constant. Another K never runs as one of these.
  template <class F>
  static void dispatch(int64_t K, const F& f) {
    if (!((K == dims ? (f(std::integral_constant<int, dims>()), true) : false) || ...))
      throw std::runtime_error("gated delta rule: there is no Hopper kernel for K = " + std::to_string(K));
  }
};

using HopperHeadDims = HeadDims<64, 96, 128, 192, 256>;

}  // namespace jet
