// The tiles of a grouped GEMM, in the order in which blocks take them. The only tile-index arithmetic: the scheduler role walks a
// TileStream.
//
// Group g has count[g] token rows from begin[g] on, cut into token tiles of equal size: the smallest of the config's sizes that needs no
// more tiles than the largest would. Tiles are numbered group by group; inside a group token tiles run fastest, so that blocks that work
// at the same time share a weight tile through L2. (Groups sorted by tile size were no faster: 230 us against 223 at 32 x ~64 rows, H200,
// 2026-11-21.)
//
// Block b takes tiles b, b + gridDim, ... of all full rounds. The tiles that are left would occupy only some blocks; with a workspace
// they are cut along K instead, and every block takes an equal part of them:
//
//     tiles   |------ t ------|---- t + 1 ----|---- t + 2 ----|      num_k_blocks each
//     blocks  |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|-- 4 --|
//
// The block with a tile's last part owns it: it adds the sums of the blocks before it and writes the result. A block whose part covers
// two tiles computes the head of the later one first and then owns the earlier one, so an owner only waits for blocks with a lower index,
// for what they do first. That cannot deadlock while all blocks of the grid fit on the card, nor when blocks start in index order.
#pragma once

#include <megamoe/schedule/group_table.cuh>
#include <megamoe/schedule/tile.cuh>

namespace megamoe {

// A walk over the tiles of this block.
template <class Config>
struct TileStream {
  // When the last round is cut: it would fill less than this part of the blocks, and a part is not shorter than kMinPart blocks of K. An
  // exchange of sums costs about as much as it saves at 80 % (H200, 2026-11-21).
  static constexpr uint32 kSplitBelowPercent = 50, kMinPart = 4;

  const GroupTable<Config>& table;
  uint32 num_k_blocks;
  uint32 next_tile;       // of the full rounds
  uint32 end_of_rounds;   // tiles from here on are cut along K
  uint32 num_parts;       // blocks that take part in those, the first ones
  uint32 part, part_end;  // this block's blocks of K among those; part_end moves down as its tiles are taken

  MEGAMOE_DEVICE TileStream(const GroupTable<Config>& table, uint32 num_k_blocks, bool can_split)
      : table(table), num_k_blocks(num_k_blocks), next_tile(blockIdx.x), end_of_rounds(table.num_tiles) {
    const uint32 left = table.num_tiles % gridDim.x;
    if (can_split && left * 100 < gridDim.x * kSplitBelowPercent) end_of_rounds -= left;
    num_parts = min_of(gridDim.x, num_split_blocks() / kMinPart);
    if (num_parts < left) num_parts = left;  // K is short: whole tiles
    part = part_begin(min_of(blockIdx.x, num_parts));
    part_end = part_begin(min_of(blockIdx.x + 1, num_parts));
  }

  MEGAMOE_DEVICE bool next(Tile& tile) {
    if (next_tile < end_of_rounds) {
      locate(next_tile, tile);
      tile.first_k = 0;
      tile.num_k = num_k_blocks;
      tile.num_contributors = 0;
      next_tile += gridDim.x;
      return true;
    }
    return next_part(tile);
  }

 private:
  // Fewer than gridDim.x tiles: products with gridDim.x fit 32 bits up to 2^17 blocks of K at 180 blocks.
  MEGAMOE_DEVICE uint32 num_split_blocks() const { return (table.num_tiles - end_of_rounds) * num_k_blocks; }
  MEGAMOE_DEVICE uint32 part_begin(uint32 block) const { return num_parts == 0 ? 0 : num_split_blocks() * block / num_parts; }

  MEGAMOE_DEVICE bool next_part(Tile& tile) {
    if (part >= part_end) return false;
    const uint32 last = (part_end - 1) / num_k_blocks, first = part / num_k_blocks;  // tiles; the later one goes first
    const uint32 tile_begin = last * num_k_blocks;
    const uint32 begin = last > first ? tile_begin : part;
    locate(end_of_rounds + last, tile);
    tile.first_k = begin - tile_begin;
    tile.num_k = part_end - begin;
    // The block that has the tile's first block of K is the last one that begins at it or before.
    const uint32 first_block = ceil_div((tile_begin + 1) * num_parts, num_split_blocks()) - 1;
    tile.num_contributors = part_end == tile_begin + num_k_blocks ? blockIdx.x - first_block : Tile::kNotOwner;
    part_end = begin;
    return true;
  }

  MEGAMOE_DEVICE void locate(uint32 idx, Tile& tile) {
    const uint32 group = table.group_of_tile(idx);
    const GroupEntry entry = table.entries[group];
    const uint32 num_token_tiles = table.num_token_tiles(group);
    const uint32 tokens = Config::TokenTiles::at(entry.token_tile_idx);
    const uint32 in_group = idx - entry.first_tile;
    const uint32 first = in_group % num_token_tiles * tokens;
    tile.group = group;
    tile.row_tile = in_group / num_token_tiles;
    tile.first_row = entry.begin + first;
    tile.num_tokens = min_of(tokens, entry.count - first);
    tile.token_tile_idx = entry.token_tile_idx;
    tile.is_only_reader = num_token_tiles == 1;
    tile.linear = 0;
    tile.number = idx;
  }
};

}  // namespace megamoe
