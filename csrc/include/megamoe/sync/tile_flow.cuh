// TileFlow: how far the token tiles of a call have come inside mega_moe, as four counters per slot of the pool.
//
//     pull warps --pulled--> loader of linear 1 --> math --activated--> fold warps --folded--> loader of linear 2 --> math --finished--+
//         ^                                                                                                                          |
//         +------------------------------------------- the slot is free for tile t + S ----------------------------------------------+
//
//     counter     counts                      per generation of a slot   awaited by
//     pulled      rows in the pool            slot_rows                  the token loader, before linear 1
//     activated   64-row blocks of linear 1   row_blocks[0]              fold
//     folded      rows with one exponent      slot_rows                  the token loader, before linear 2
//     finished    64-row blocks of linear 2   row_blocks[1]              pull, before the slot's next tile, if it has one
//
// Every publication is a release-add, every wait an acquire. Within a call counters only grow, by the same amount in each generation: a
// tile's last row stands for the rows that its slot has beyond the tile. So generation g is complete at g + 1 amounts, whatever the sizes
// of the tiles. `clear` sets all back when the call is over.
#pragma once

#include <megamoe/schedule/moe_tasks.cuh>
#include <megamoe/sync/peer_wait.cuh>

namespace megamoe {

struct alignas(16) SlotCounters {
  uint32 pulled, activated, folded, finished;
};

struct TileFlow {
  SlotCounters* counters;  // [num_slots]
  TileRing ring;
  uint32 row_blocks[2];    // 64-row blocks of weights of linear 1 and 2

  // Publications, by one thread behind a barrier with those whose writes they publish.
  MEGAMOE_DEVICE void publish_pulled(RowPlace row) const { machine::add_release_gpu(&of(row.tile).pulled, share_of(row, 1)); }
  MEGAMOE_DEVICE void publish_activated(uint32 tile, uint32 num_row_blocks) const {
    machine::add_release_gpu(&of(tile).activated, num_row_blocks);
  }
  // Row `row` and those behind it, `count` in all.
  MEGAMOE_DEVICE void publish_folded(RowPlace row, uint32 count) const {
    machine::add_release_gpu(&of(row.tile).folded, share_of(row, count));
  }
  MEGAMOE_DEVICE void publish_finished(uint32 tile, uint32 num_row_blocks) const {
    machine::add_release_gpu(&of(tile).finished, num_row_blocks);
  }

  // Whether a later tile takes this one's slot: otherwise nobody waits for it to be finished.
  MEGAMOE_DEVICE bool is_slot_used_again(uint32 tile, uint32 num_tiles) const { return tile + ring.num_slots < num_tiles; }

  // Waits, by one thread, which acquires for itself. They return in any case; after a failure what they waited for may be missing.
  template <class Watch>
  MEGAMOE_DEVICE void wait_pulled(uint32 tile, const Watch& watch) const {
    wait(&of(tile).pulled, (ring.generation(tile) + 1) * ring.slot_rows, watch);
  }
  template <class Watch>
  MEGAMOE_DEVICE void wait_activated(uint32 tile, const Watch& watch) const {
    wait(&of(tile).activated, (ring.generation(tile) + 1) * row_blocks[0], watch);
  }
  template <class Watch>
  MEGAMOE_DEVICE void wait_folded(uint32 tile, const Watch& watch) const {
    wait(&of(tile).folded, (ring.generation(tile) + 1) * ring.slot_rows, watch);
  }
  // The slot's tile before this one is done with.
  template <class Watch>
  MEGAMOE_DEVICE void wait_free(uint32 tile, const Watch& watch) const {
    if (ring.generation(tile) > 0) wait(&of(tile).finished, ring.generation(tile) * row_blocks[1], watch);
  }
  // Whether wait_free would return at once.
  MEGAMOE_DEVICE bool is_free(uint32 tile) const {
    return ring.generation(tile) == 0 || machine::ld_acquire_gpu(&of(tile).finished) >= ring.generation(tile) * row_blocks[1];
  }

  // When no thread of the rank will wait or publish any more in this call. Thread `thread` of `num_threads`.
  MEGAMOE_DEVICE void clear(uint32 thread, uint32 num_threads) const {
    for (uint32 slot = thread; slot < ring.num_slots; slot += num_threads) counters[slot] = {0, 0, 0, 0};
  }

 private:
  MEGAMOE_DEVICE SlotCounters& of(uint32 tile) const { return counters[ring.slot(tile)]; }
  MEGAMOE_DEVICE uint32 share_of(RowPlace row, uint32 count) const {
    return row.idx + count == row.num_rows ? ring.slot_rows - row.num_rows + count : count;
  }

  template <class Watch>
  MEGAMOE_DEVICE void wait(const uint32* counter, uint32 target, const Watch& watch) const {
    watch.wait(watch.symm.rank, [&](int64& got) {
      got = machine::ld_acquire_gpu(counter);
      return static_cast<uint32>(got) >= target;
    });
  }
};

// How a rank's blocks end a call: each says when it has published all its tasks; the last one tells all ranks (combine_ready) and clears
// the counters.
struct CallEnd {
  uint32* num_tickets;   // tasks claimed; 0 between calls
  uint32* num_finished;  // blocks; 0 between calls
  uint32 num_expected;   // blocks of the rank

  MEGAMOE_DEVICE uint32 claim() const { return machine::add_relaxed_gpu(num_tickets, 1); }

  // By one thread of a block, which has seen the end of all other roles' tasks. True for the last one: it has acquired all that any of them
  // stored, and no thread of the rank will claim, wait or publish any more in this call.
  MEGAMOE_DEVICE bool finish() const { return machine::add_acq_rel_gpu(num_finished, 1) + 1 == num_expected; }
  MEGAMOE_DEVICE void clear() const { *num_tickets = *num_finished = 0; }
};

}  // namespace megamoe
