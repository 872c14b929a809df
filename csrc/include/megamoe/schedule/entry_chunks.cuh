// Entry chunks: which (token, slot) entries of which rank a block of moe_route and of moe_assign looks at.
//
// The chunks of a rank begin with its own entries, then come those of the rank after it, and so on round: rows of an expert follow that
// order, so ranks that work at the same pace read from different ranks and push to different ones, where all would else crowd on one.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

struct EntryChunk {
  uint32 src;    // rank whose entries they are
  uint32 first;  // of its token * K + slot
};

// Chunk `block` of W * kNumChunks on `rank`.
template <class Config>
MEGAMOE_HOST_DEVICE constexpr EntryChunk entry_chunk(uint32 block, uint32 rank) {
  return {(rank + block / Config::kNumChunks) % Config::kNumRanks, block % Config::kNumChunks * Config::kChunkEntries};
}

}  // namespace megamoe
