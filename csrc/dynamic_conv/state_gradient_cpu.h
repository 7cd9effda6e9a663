// Gradients that pass through conv_state and conv_state_out, which hold copies of inputs.
#pragma once

#include "csrc/dynamic_conv/rows_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

// dstate [channels, W-1], the dconv_state of sequence n and the channels from d0: what a sequence shorter than W-1
// hands on of its conv_state. Position i of conv_state is position i - length of conv_state_out.
template <class T>
void start_state_gradient(const ConvInputs& in, const T* grad_conv_state_out, int64_t n, long d0, long channels,
                          Arithmetic<T>* dstate) {
  const long K = in.W - 1;
  const int64_t length = sequence_length(in, n);
  for (long c = 0; c < channels; ++c)
    for (long i = 0; i < K; ++i) {
      const bool passes = grad_conv_state_out && i >= length;
      const long at = (n * in.D + d0 + c) * K + i - length;
      dstate[c * K + i] = passes ? load_some(grad_conv_state_out + at, 1, 1)[0] : Arithmetic<T>(0);
    }
}

template <class A>
JET_INLINE void add_state_gradient(A* dstate, long stride, long n, Vector<A> dinput) {
  for (long c = 0; c < n; ++c) dstate[c * stride] += dinput[c];
}

// d conv_state_out of the input that a row is, for channels [d0, d0 + n)
template <class T, int W>
JET_INLINE Vector<Arithmetic<T>> tail_gradient(const ConvInputs& in, const T* grad_conv_state_out, const Row& row,
                                               long d0, long n) {
  const int64_t j = grad_conv_state_out ? row.position - sequence_length(in, row.sequence) + (W - 1) : -1;
  if (j < 0) return Vector<Arithmetic<T>>{};
  return load_some(grad_conv_state_out + (row.sequence * in.D + d0) * (W - 1) + j, W - 1, n);
}

}  // namespace jet::cpu::JET_CPU_ISA
