// Static facts of the FP4 GEMM, alone (fp4_gemm) or in a layer (mega_moe): parameters, shared memory, barriers.
#pragma once

#include <megamoe/arch/sm90_fp4.cuh>
#include <megamoe/ptx/cluster.cuh>
#include <megamoe/ptx/control.cuh>
#include <megamoe/ptx/copy.cuh>
#include <megamoe/ptx/memory.cuh>
#include <megamoe/ptx/wgmma.cuh>
#include <megamoe/schedule/grouped_tiles.cuh>
#include <megamoe/sync/pipeline.cuh>

namespace megamoe {

constexpr uint32 kMaxTokenTileSizes = 16;

struct Fp4GemmParams {
  ptx::TensorMap x_maps[kMaxTokenTileSizes];  // codes of x [num_rows, K]; box [token tile, 128], or for each block of a cluster its part
  ptx::TensorMap w_map;                       // weight units [G, num_row_blocks, num_k_blocks]; box [1, math warpgroups, 1]
  const uint8* w_row_base;                    // [G, 64 * num_row_blocks]
  const uint8* x_sf;                          // [num_rows] UE8M0
  Bf16* out;                                  // [num_rows, n]: epilogues store and accumulate, unless they scatter
  const int64* row_dst;                       // [num_rows] address of each row's n values, 0 to drop it: scatter
  Grouping grouping;
  uint32 n;                                   // weight rows without padding
  uint32 num_row_blocks, num_k_blocks;        // storage units per group
  float* workspace;                           // roles/tail_sums.cuh; null: tiles are never cut along K
  const float* bias;                          // [G, n] in kernel row order, or null
  const float* row_weight;                    // [num_rows] factor of the bias (store) or of the activated row (swiglu), or null for 1
  // Epilogue swiglu:
  uint8* a_codes;                             // [num_rows, n / 2] E4M3
  uint8* a_sf;                                // [num_rows, n / 64] UE8M0 per 32 channels
  float limit, alpha, up_bias;                // limit: +inf for none; alpha: 1 with up_bias 0 is SiLU
};

constexpr uint32 kTileSlots = 4;
using TilePipeline = Pipeline<kTileSlots>;

// Blocks of a cluster work on neighbouring row tiles of one token tile at a time. Each brings a part of its tokens to all of them.
template <class Config>
using StagePipeline = Pipeline<Config::kStages, Config::kClusterBlocks>;

// The first token of a tile that block `rank` of a cluster brings: parts are whole swizzle patterns of 8 tokens.
template <class Config>
MEGAMOE_DEVICE uint32 first_token_of(uint32 rank, uint32 num_tokens) { return round_up(num_tokens * rank / Config::kClusterBlocks, 8); }

// Shared memory of a block. Stage s holds kTileRows / 64 weight units, then the tokens at a 1024-byte boundary, as the swizzle wants.
template <class Config>
struct SmemPlan {
  static constexpr uint32 kWeightBytes = Config::kMathWarpgroups * sm90::WeightUnit::kBytes;
  static constexpr uint32 kTokensOffset = round_up(kWeightBytes, 1024);
  static constexpr uint32 kMaxTokens = Config::TokenTiles::largest();
  static constexpr uint32 kStageBytes = kTokensOffset + kMaxTokens * sm90::WeightUnit::kK;
  // Epilogue staging of one warpgroup: a token per row, 64 channels in BF16 or 32 activated ones in FP32; 16 bytes of padding keep 8
  // consecutive rows in different banks.
  static constexpr uint32 kStagingPitch = 64 * 2 + 16;
  static constexpr uint32 kStagingBytes = kMaxTokens * kStagingPitch;
  static constexpr uint32 kTokenFloats = Config::kScatter ? 4 : Config::kSwiglu || Config::kHasBias ? 2 : 1;  // TokenValues

  static constexpr uint32 kStaging = Config::kStages * kStageBytes;
  static constexpr uint32 kTokenValues = kStaging + Config::kMathWarpgroups * kStagingBytes;
  static constexpr uint32 kBiases = kTokenValues + Config::kMathWarpgroups * kTokenFloats * kMaxTokens * 4;  // one per row of the tile
  static constexpr uint32 kTable = kBiases + (Config::kHasBias ? Config::kMathWarpgroups * 64 * 4 : 0);
  static constexpr uint32 kTiles = round_up(kTable + sizeof(GroupTable<Config>), 16);
  static constexpr uint32 kTileBarriers = kTiles + kTileSlots * sizeof(Tile);
  static constexpr uint32 kBarriers = kTileBarriers + TilePipeline::kBarrierBytes;
  static constexpr uint32 kBytes = kBarriers + StagePipeline<Config>::kBarrierBytes;
};

// Where a warpgroup keeps values of its tile's tokens for the epilogue: rows of shared memory with a place for every token.
template <class Config>
struct TokenValues {
  static constexpr uint32 kRowBytes = SmemPlan<Config>::kMaxTokens * 4;
  uint32 scales;  // shared address; FP32, as all but the destinations

  MEGAMOE_DEVICE TokenValues(uint32 base, uint32 warpgroup)
      : scales(base + SmemPlan<Config>::kTokenValues + warpgroup * SmemPlan<Config>::kTokenFloats * kRowBytes) {}

  MEGAMOE_DEVICE uint32 weights() const { return scales + kRowBytes; }
  MEGAMOE_DEVICE uint32 destinations() const { return scales + 2 * kRowBytes; }  // scatter: int64, two rows
};

// Named barriers; 0 is __syncthreads. Each of at most four math warpgroups has its own for its epilogue; kMathBarrier is for all of them.
enum NamedBarrier : uint32 { kEpilogueBarrier = 1, kMathBarrier = 5 };

}  // namespace megamoe
