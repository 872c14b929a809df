// arrive_last: which block of a grid is the last to finish, so that it can go on with what all have written.
#pragma once

#include <megamoe/ptx/memory.cuh>

namespace megamoe {

// True for all threads of the last block to call this; it sees what the others wrote before. `counter` is 0 between launches, and is again
// afterwards. All threads of every block must call.
MEGAMOE_DEVICE bool arrive_last(uint32* counter) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::fence_acq_rel_gpu();
    is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    ptx::fence_acq_rel_gpu();
  }
  __syncthreads();
  return is_last;
}

}  // namespace megamoe
