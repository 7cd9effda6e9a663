// Element-wise reductions of cp.reduce.async.bulk[.tensor].
#pragma once

#include <optional>
#include <string>

#include "async.h"
#include "tensor_map.h"

namespace hoppersim {

enum class Reduce : uint8_t { add, min, max, inc, dec, bit_and, bit_or, bit_xor };

// The reduction that a modifier names, if one does.
std::optional<Reduce> reduction_of(const Instruction& i);
bool reduces(Reduce reduce, TensorType type);  // PTX has this pair

// memory[e] = reduce(memory[e], data[e]); each element atomically (other clusters may run on another host thread).
void reduce_elements(Reduce reduce, TensorType type, void* memory, const void* data, size_t bytes);

}  // namespace hoppersim
