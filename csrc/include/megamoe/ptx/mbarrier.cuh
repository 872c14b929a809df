// mbarrier in shared memory. One function per instruction (PTX ISA, "mbarrier").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE void mbarrier_init(uint32 barrier, uint32 num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// Makes the initialisation visible to the asynchronous proxy and to the cluster.
MEGAMOE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

MEGAMOE_DEVICE void mbarrier_arrive(uint32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// At a barrier of any block of the cluster: `mapped` is from map_shared. For threads that have only read. A release to the cluster, which
// writes would need, is a MEMBAR.GPU.
MEGAMOE_DEVICE void mbarrier_arrive_cluster(uint32 mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

MEGAMOE_DEVICE void mbarrier_arrive_expect_bytes(uint32 barrier, uint32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

// Whether the phase with this parity is complete (acquire if it is).
MEGAMOE_DEVICE bool mbarrier_test(uint32 barrier, uint32 parity) {
  uint32 done;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits for the completion of the phase with this parity (acquire).
MEGAMOE_DEVICE void mbarrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra arrived;\n"
      "bra again;\n"
      "arrived:}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// The same unless `done`, which must be one for the whole warp. As a branch around mbarrier_wait the compiler would make the warp converge.
MEGAMOE_DEVICE void mbarrier_wait_unless(bool done, uint32 barrier, uint32 parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "setp.ne.u32 done, %2, 0;\n"
      "@done bra arrived;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra arrived;\n"
      "bra again;\n"
      "arrived:}" ::"r"(barrier), "r"(parity), "r"(static_cast<uint32>(done))
      : "memory");
}

}  // namespace megamoe::ptx
