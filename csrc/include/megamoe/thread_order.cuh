// Thread order (formats/thread_order.py): of a block of 128 codes, word m of the eight of group g lies at word 4 m + g, where the main loop
// gives it to a thread that holds weights of group g only.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

// Where word `word` of a row of codes lies in thread order.
MEGAMOE_DEVICE constexpr uint32 place_in_thread_order(uint32 word) { return word / 32 * 32 + word % 8 * 4 + word / 8 % 4; }

// Stores words first .. first + 3 of `row`, first a multiple of 4. Lanes with the same words of all groups of a block fill 16 bytes together.
MEGAMOE_DEVICE void store_in_thread_order(uint32* row, uint32 first, uint4 words) {
  uint32* to = row + place_in_thread_order(first);
  to[0] = words.x, to[4] = words.y, to[8] = words.z, to[12] = words.w;
}

}  // namespace megamoe
