// Handoff: items from one thread of a block to several others, in order, through a few slots. It stands for the rings over mbarriers in
// shared memory (TilePipeline, Pipeline); those are not under test here.
#pragma once

#include <atomic>

#include "delays.hpp"

namespace protocol {

template <class Item, uint32 kSlots>
struct Handoff {
  uint32 num_consumers;
  Item slots[kSlots];
  std::atomic<uint32> num_published{0}, num_read[kSlots]{};

  explicit Handoff(uint32 num_consumers) : num_consumers(num_consumers) {}

  // Item number `n` of the only producer.
  void put(uint32 n, const Item& item) {
    while (num_read[n % kSlots].load(std::memory_order_acquire) < n / kSlots * num_consumers) wait_briefly();
    slots[n % kSlots] = item;
    num_published.store(n + 1, std::memory_order_release);
  }
  // Item number `n`, by each consumer once.
  Item take(uint32 n) {
    while (!is_there(n)) wait_briefly();
    const Item item = slots[n % kSlots];
    give_back(n);
    return item;
  }
  // By a consumer that keeps the slot for a while.
  bool is_there(uint32 n) const { return num_published.load(std::memory_order_acquire) > n; }
  const Item& look_at(uint32 n) const { return slots[n % kSlots]; }
  void give_back(uint32 n) { num_read[n % kSlots].fetch_add(1, std::memory_order_release); }
};

}  // namespace protocol
