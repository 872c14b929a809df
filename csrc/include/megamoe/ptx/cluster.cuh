// Clusters of blocks: who is who, where the others' shared memory is, and the barrier of all their threads (PTX ISA, "%cluster_ctarank",
// "mapa", "st.async", "barrier.cluster").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

// Of this block in its cluster.
MEGAMOE_DEVICE uint32 cluster_rank() {
  uint32 r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// Where block `rank` of the cluster has what this block has at `address` of its shared memory.
MEGAMOE_DEVICE uint32 map_shared(uint32 address, uint32 rank) {
  uint32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}

// Stores a word into the shared memory of any block of the cluster; its 4 bytes count at `mapped_barrier` of the same block.
MEGAMOE_DEVICE void st_async_cluster(uint32 mapped, uint32 v, uint32 mapped_barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(mapped), "r"(v), "r"(mapped_barrier)
               : "memory");
}

// Meets all threads of the cluster that have not exited.
MEGAMOE_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::: "memory");
}

}  // namespace megamoe::ptx
