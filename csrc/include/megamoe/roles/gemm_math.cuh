// Math warpgroup of fp4_gemm: 64 weight rows of every tile, from the sums over K to the epilogue.
#pragma once

#include <megamoe/roles/gemm_accumulate.cuh>
#include <megamoe/roles/gemm_schedule.cuh>
#include <megamoe/roles/store_epilogue.cuh>
#include <megamoe/roles/swiglu_epilogue.cuh>
#include <megamoe/roles/tail_sums.cuh>

namespace megamoe {

// A math warpgroup's walk over its tiles.
template <class Config>
struct TileWalk {
  const Fp4GemmParams& p;
  StageReader<Config> reader;
  TileReader tiles;
  Tile tile;  // the current one

  MEGAMOE_DEVICE void next() { tile = tiles.next(); }
  MEGAMOE_DEVICE bool is_valid() const { return tile.num_tokens > 0; }
  MEGAMOE_DEVICE uint32 row_block() const { return tile.row_tile * Config::kMathWarpgroups + reader.warpgroup; }
  MEGAMOE_DEVICE bool has_rows() const { return row_block() < p.num_row_blocks; }
  MEGAMOE_DEVICE bool takes(uint32 token_tile_idx) const { return is_valid() && tile.token_tile_idx == token_tile_idx && has_rows(); }
};

// Computes tiles as long as they have this size. The first block of each is expanded before the epilogue of the one before it, and what the
// epilogue needs is fetched before the sums, so that neither latency shows.
template <class Config, uint32 kIdx>
MEGAMOE_DEVICE void compute_tiles(TileWalk<Config>& walk) {
  constexpr uint32 kTokens = Config::TokenTiles::at(kIdx);
  Accumulator<Config, kTokens> accumulator;
  accumulator.begin(walk.reader);
  bool has_next = true;
#pragma unroll 1
  while (has_next) {
    const EpilogueTile where(walk.p, walk.tile, walk.row_block());
    const TokenValues<Config> values(walk.reader.base, walk.reader.warpgroup);
    if constexpr (Config::kSwiglu)
      where.template fetch_weights<kTokens>(walk.p, values.weights());
    else
      fetch_store_inputs<Config, kTokens>(walk.p, where, values);
    accumulator.run(walk.reader, walk.tile.num_k);
    const uint32 num_contributors = walk.tile.num_contributors;
    walk.next();
    has_next = walk.takes(kIdx);
    if (has_next) accumulator.begin(walk.reader);
    const TailSums<Config> tail{walk.p.workspace, walk.reader.warpgroup, walk.reader.thread, kEpilogueBarrier + walk.reader.warpgroup};
    if (num_contributors == Tile::kNotOwner) {
      tail.template leave<kTokens>(accumulator.totals);
      continue;
    }
    tail.template add<kTokens>(accumulator.totals, num_contributors);
    if constexpr (Config::kSwiglu)
      swiglu_epilogue<Config, kTokens>(accumulator.totals, walk.p, where, walk.reader.base, walk.reader.warpgroup);
    else
      store_epilogue<Config, kTokens>(accumulator.totals, walk.p, where, walk.reader.base, walk.reader.warpgroup);
    if constexpr (Config::kScatter) ptx::barrier_sync<128>(kEpilogueBarrier + walk.reader.warpgroup);  // destinations are read to the end
  }
}

// Each token tile size is a function of its own: an accumulator array shared between sizes would live in local memory.
template <class Config, uint32 kIdx = 0>
MEGAMOE_DEVICE void dispatch_tiles(TileWalk<Config>& walk) {
  if constexpr (kIdx + 1 == Config::TokenTiles::kCount) {
    compute_tiles<Config, kIdx>(walk);
  } else {
    if (walk.tile.token_tile_idx == kIdx)
      compute_tiles<Config, kIdx>(walk);
    else
      dispatch_tiles<Config, kIdx + 1>(walk);
  }
}

template <class Config>
MEGAMOE_DEVICE void gemm_math(const Fp4GemmParams& p, TileReader tiles, uint32 base, uint32 warpgroup) {
  const StagePipeline<Config> ring(base + SmemPlan<Config>::kBarriers);
  const StageReader<Config> reader(ring, base, warpgroup);
  TileWalk<Config> walk{p, reader, tiles};
  walk.next();
#pragma unroll 1
  while (walk.is_valid()) {
    if (walk.has_rows()) {
      dispatch_tiles<Config>(walk);
    } else {
      skip_tile<Config>(walk.reader, walk.tile.num_k);
      walk.next();
    }
  }
}

}  // namespace megamoe
