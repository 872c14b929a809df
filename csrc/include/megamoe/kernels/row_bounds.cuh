// row_bounds, group_bounds: how the rows of x are divided, as the caller says it -> [G, 2] first and one past the last row of each group.
//
// Only the device has seen the values, so it checks them: what is out of range is reported and treated as padding; no bound leads out of x.
#pragma once

#include <megamoe/device_errors.cuh>

namespace megamoe {

// int32 or int64 values behind one pointer.
struct Indices {
  const void* values;
  uint32 is_wide;

  MEGAMOE_DEVICE int64 operator[](uint32 i) const {
    return is_wide ? static_cast<const int64*>(values)[i] : static_cast<const int32*>(values)[i];
  }
};

// Output rows that padding rows of x leave behind: bytes, since the kernel does not care what they are.
struct PaddingFill {
  uint8* rows;       // [num_rows, row_bytes] cleared, or null; row_bytes is a multiple of 16
  uint8* scales;     // [num_rows, scale_bytes] set to `scale`, or null
  uint64 row_bytes;
  uint32 scale_bytes, scale;
};

struct RowBoundsParams {
  Indices expert_idx;  // [num_rows]: -1 is a padding row
  int32* bounds;       // [G, 2], all -1 on entry, which is what groups without rows keep
  PaddingFill fill;
  DeviceErrors errors;
  uint32 num_rows, num_groups;
};

constexpr uint32 kRowsPerBlock = 32;

// Blocks of 128 threads, 32 rows each: every warp looks at the block's rows, the first one records them, all fill the padding rows.
MEGAMOE_DEVICE void row_bounds(const RowBoundsParams& p) {
  const uint32 first_row = blockIdx.x * kRowsPerBlock, row = first_row + threadIdx.x % 32;
  const bool is_row = row < p.num_rows;
  const int64 group = is_row ? p.expert_idx[row] : -1;
  const bool has_group = group >= 0 && group < p.num_groups;
  if (threadIdx.x < 32 && has_group) {
    // NOTE: the minimum, and not the first to arrive, makes the row that is reported the second run's first row in any order of arrival.
    if (row == 0 || p.expert_idx[row - 1] != group) {
      const uint32 other = atomicMin(reinterpret_cast<uint32*>(p.bounds) + 2 * group, row);
      if (other != ~0u) p.errors.report(kRowsApart, row > other ? row : other, group);
    }
    if (row + 1 == p.num_rows || p.expert_idx[row + 1] != group) atomicMax(p.bounds + 2 * group + 1, static_cast<int32>(row + 1));
  }
  if (threadIdx.x < 32 && !has_group && group != -1) p.errors.report(kIndexOutOfRange, row, group);

  for (uint32 padding = __ballot_sync(~0u, is_row && !has_group); padding != 0; padding &= padding - 1) {
    const uint64 padding_row = first_row + __ffs(padding) - 1;
    if (p.fill.rows != nullptr) {
      auto* pieces = reinterpret_cast<uint4*>(p.fill.rows + padding_row * p.fill.row_bytes);
      for (uint32 i = threadIdx.x; i < p.fill.row_bytes / 16; i += blockDim.x) pieces[i] = make_uint4(0, 0, 0, 0);
    }
    if (p.fill.scales != nullptr) {
      uint8* scales = p.fill.scales + padding_row * p.fill.scale_bytes;
      for (uint32 i = threadIdx.x; i < p.fill.scale_bytes; i += blockDim.x) scales[i] = p.fill.scale;
    }
  }
}

struct GroupBoundsParams {
  Indices values;       // offsets [G + 1], or with a group_stride counts [G]
  int32* bounds;        // [G, 2]
  DeviceErrors errors;
  uint32 num_rows, num_groups;
  uint32 group_stride;  // rows of x per group; 0: values are offsets
};

MEGAMOE_DEVICE uint32 clamp_to(int64 value, uint32 largest) {
  return value < 0 ? 0 : value > largest ? largest : static_cast<uint32>(value);
}

// One block.
MEGAMOE_DEVICE void group_bounds(const GroupBoundsParams& p) {
  for (uint32 g = threadIdx.x; g < p.num_groups; g += blockDim.x) {
    const int64 value = p.values[g];
    uint32 begin, end;
    if (p.group_stride != 0) {
      if (value < 0 || value > p.group_stride) p.errors.report(kCountOutOfRange, g, value);
      begin = g * p.group_stride;
      end = begin + clamp_to(value, p.group_stride);
    } else {
      const int64 next = p.values[g + 1];
      if (g == 0 && value != 0) p.errors.report(kOffsetOutOfRange, 0, value);
      if (next < value || next > p.num_rows) p.errors.report(kOffsetOutOfRange, g + 1, next);
      begin = clamp_to(value, p.num_rows);
      end = clamp_to(next, p.num_rows);
    }
    p.bounds[2 * g] = begin;
    p.bounds[2 * g + 1] = end;
  }
}

}  // namespace megamoe
