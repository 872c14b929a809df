// FP4 weights on Hopper: one storage unit of 64 rows x 128 K in shared memory -> the A registers of four wgmma k32 steps.
//
// There is no FP4 conversion before Blackwell; a byte permutation is the lookup table. The exponent of a group is added to the table, so
// the registers hold FP4 * 2^(e - 14) in E5M2, exactly, for e in 1..27 (formats/layout_sm90.py checks the window). 7 operations for 8
// weights.
#pragma once

#include <megamoe/ptx/numeric.cuh>
#include <megamoe/ptx/shared.cuh>

namespace megamoe::sm90 {

struct WeightUnit {
  static constexpr uint32 kRows = 64, kK = 128, kCodeBytes = 4096, kBytes = 4352;
};

// 16 registers: element 4 * j + i is register a[i] of k32 step j.
using WeightFragment = uint32[16];

// Eight weights of one word -> the two registers that hold columns 4t..4t+3 (low) and 16 + 4t.. (high) of one row.
// Word: magnitudes in the nibbles; the bit above magnitude nibbles 1, 3, 5, 7 is a sign of `low`, the one above 0, 2, 4, 6 of `high`.
MEGAMOE_DEVICE void expand_word(uint32 word, uint32 table_low, uint32 table_high, uint32& low, uint32& high) {
  const uint32 magnitudes = word & 0x77777777u;  // a set top bit would make the permutation replicate signs
  low = ptx::and_or(word, 0x80808080u, ptx::permute_bytes(table_low, table_high, magnitudes));
  high = ptx::and_or(word << 4, 0x80808080u, ptx::permute_bytes(table_low, table_high, magnitudes >> 16));
}

// The exponents of a thread's two rows. In natural order each k32 step of a row has its own. In thread order (formats/thread_order.py) a
// thread holds one group of each row: two tables instead of eight, 1.5 to 3 % of mega_moe's time from 512 tokens on.
template <bool kThreadOrder>
struct GroupExponents {
  ptx::Words2 of_rows;  // steps 0..3 of the upper row, then of the lower

  MEGAMOE_DEVICE void load(uint32 exponents, uint32 thread) { of_rows = ptx::ld_shared_64(exponents + (thread / 4) * 8); }
  MEGAMOE_DEVICE uint32 at(uint32 step, uint32 half) const { return ptx::permute_bytes(half ? of_rows.y : of_rows.x, 0, 0x4440 + step); }
};

template <>
struct GroupExponents<true> {
  uint32 of_rows;  // a byte of the upper row, then one of the lower

  MEGAMOE_DEVICE void load(uint32 exponents, uint32 thread) { of_rows = ptx::ld_shared_16(exponents + thread * 2); }
  MEGAMOE_DEVICE uint32 at(uint32, uint32 half) const { return half ? of_rows >> 8 : of_rows & 0xff; }
};

// This thread's part of a unit as it lies in memory: 64 codes and the exponents of their groups.
template <bool kThreadOrder>
struct PackedFragment {
  ptx::Words4 codes[2];
  GroupExponents<kThreadOrder> exponents;

  // From the unit at `unit`. `thread` is the index in the warpgroup.
  MEGAMOE_DEVICE void load(uint32 unit, uint32 thread) {
    codes[0] = ptx::ld_shared_128(unit + thread * 16);
    codes[1] = ptx::ld_shared_128(unit + thread * 16 + 2048);
    exponents.load(unit + WeightUnit::kCodeBytes, thread);
  }
};

template <bool kThreadOrder>
MEGAMOE_DEVICE void expand(const PackedFragment<kThreadOrder>& packed, WeightFragment& a) {
  const ptx::Words4 q0 = packed.codes[0], q1 = packed.codes[1];
  const uint32 words[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
  for (uint32 j = 0; j < 4; ++j) {
#pragma unroll
    for (uint32 half = 0; half < 2; ++half) {
      const uint32 e = packed.exponents.at(j, half);
      // Byte m is the E5M2 code of magnitude m (0 .5 1 1.5 | 2 3 4 6) times 2^(e - 14); byte 0 stays 0.
      const uint32 table_low = e * 0x04040400u + 0x06040000u, table_high = e * 0x04040404u + 0x0e0c0a08u;
      expand_word(words[2 * j + half], table_low, table_high, a[4 * j + half], a[4 * j + 2 + half]);
    }
  }
}

}  // namespace megamoe::sm90
