// What all programs share: tables of rows per expert, all vectors of counts, a verdict.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <megamoe/sync/tile_flow.cuh>

namespace protocol {

using namespace megamoe;

template <uint32... kSizes>
struct TileConfig {
  static constexpr uint32 kMaxGroups = 4;
  using TokenTiles = Sizes<kSizes...>;
};

// Ends the program at the first thing that is wrong; other threads may be anywhere.
template <class... Values>
void expect(bool is_true, const char* format, Values... values) {
  if (is_true) return;
  std::printf("wrong: ");
  std::printf(format, values...);
  std::printf("\n");
  std::fflush(stdout);
  std::_Exit(1);
}

inline std::vector<int32> offsets_of(const std::vector<uint32>& counts) {
  std::vector<int32> offsets{0};
  for (const uint32 count : counts) offsets.push_back(offsets.back() + static_cast<int32>(count));
  return offsets;
}

// visit(counts) for all vectors of `num_groups` counts up to `largest`.
template <class Visit>
void for_all_counts(uint32 num_groups, uint32 largest, Visit visit) {
  std::vector<uint32> counts(num_groups, 0);
  for (;;) {
    visit(counts);
    uint32 g = 0;
    while (g < num_groups && counts[g] == largest) counts[g++] = 0;
    if (g == num_groups) return;
    ++counts[g];
  }
}

// Fills the table as GroupTable::build does on the device: a prefix sum over the token tiles.
template <class AnyConfig>
void build_table(GroupTable<AnyConfig>& table, const std::vector<int32>& offsets) {
  const uint32 num_groups = static_cast<uint32>(offsets.size()) - 1;
  Grouping grouping{};
  grouping.offsets = offsets.data();
  grouping.num_groups = num_groups;
  grouping.num_rows = offsets.back();
  table.num_groups = num_groups;
  table.num_tiles = 0;
  for (uint32 g = 0; g < num_groups; ++g) {
    table.describe(grouping, g);
    table.entries[g].first_tile = table.num_tiles;
    table.num_tiles += table.num_token_tiles(g);
  }
}

}  // namespace protocol
