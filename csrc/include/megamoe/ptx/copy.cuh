// Bulk and tensor copies into shared memory that complete on an mbarrier, bulk copies out of it that complete in groups of the thread, and
// the fence between them and ordinary accesses (PTX ISA, "cp.async.bulk", "fence.proxy.async").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

// CUtensorMap, made by the host; opaque here.
struct alignas(64) TensorMap {
  uint64 opaque[16];
};

MEGAMOE_DEVICE uint64 policy_evict_first() {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

MEGAMOE_DEVICE uint64 policy_evict_normal() {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

MEGAMOE_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Into L2, for a later copy. Address and size are multiples of 16 bytes.
MEGAMOE_DEVICE void bulk_prefetch(const void* from, uint32 num_bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(num_bytes) : "memory");
}

// Copies of 4 or 8 bytes to shared memory by the thread that issues them, which sees them after copy_async_wait.
template <uint32 kBytes>
MEGAMOE_DEVICE void copy_async(uint32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}

MEGAMOE_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Addresses and size are multiples of 16 bytes.
MEGAMOE_DEVICE void bulk_load(uint32 destination, const void* source, uint32 num_bytes, uint32 barrier, uint64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source), "r"(num_bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Out of shared memory. Part of the thread's next bulk group.
MEGAMOE_DEVICE void bulk_store(void* destination, uint32 source, uint32 num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(num_bytes) : "memory");
}
MEGAMOE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all of the thread's bulk groups are complete: what they stored can be published.
MEGAMOE_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders ordinary accesses to global memory before it against bulk and tensor copies after it, and the reverse.
MEGAMOE_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Box of the map at (column, row); what lies outside the tensor arrives as zeros and counts as bytes.
MEGAMOE_DEVICE void tensor_load_2d(uint32 destination, const TensorMap* map, int32 column, int32 row, uint32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3}], [%4];" ::"r"(destination),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// The same into every block of the cluster that `blocks` has a bit for: to the same place of each, the bytes counted by the same barrier of
// each.
MEGAMOE_DEVICE void tensor_load_2d_multicast(uint32 destination, const TensorMap* map, int32 column, int32 row, uint32 barrier,
                                             uint16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2,%3}], [%4], %5;" ::"r"(
          destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// tensor_load_2d of four dimensions, coordinates from the innermost on.
MEGAMOE_DEVICE void tensor_load_4d(uint32 destination, const TensorMap* map, int32 x, int32 y, int32 z, int32 w, uint32 barrier,
                                   uint64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2,%3,%4,%5}], [%6], "
      "%7;" ::"r"(destination),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(policy)
      : "memory");
}

}  // namespace megamoe::ptx
