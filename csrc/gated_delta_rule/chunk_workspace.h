// What lies where in the workspace of the forward: a chunk's image is what the backward needs of the forward's first stage.
#pragma once

#include "csrc/gated_delta_rule/chunk_image.h"

namespace jet::hopper {

struct ChunkWorkspace {
  int64_t most_chunks;                 // of all sequences together; with cu_seqlens the device knows the number
  int64_t images, first_chunk, bytes;  // offsets: [most_chunks, H] of kImageBytes; [N + 1] int32; the end
};

inline ChunkWorkspace chunk_workspace(const ChunkGatedDeltaRuleParams& p, bool packed) {
  ChunkWorkspace w{};
  const int64_t per_row = (p.T + C - 1) / C;
  w.most_chunks = packed ? p.T / C + p.N : p.B * per_row;  // every sequence but for its last chunk is whole chunks
  w.images = 0;
  w.first_chunk = w.most_chunks * p.H * kImageBytes;
  w.bytes = w.first_chunk + (packed ? (p.N + 1) * 4 : 0);
  return w;
}

}  // namespace jet::hopper
