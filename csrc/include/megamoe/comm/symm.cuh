// Symm: the arenas of all ranks as one of them sees them. A kernel takes it by value and reaches any rank's element through the accessors
// of the generated `struct Layout`:
//     *symm.at<&Layout::combine_ready>(peer, symm.rank, 0) = epoch;
// Nothing else computes an address across ranks. Compiles with nvcc, NVRTC and a host compiler; includes no standard header for that
// reason.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

struct Symm {
  // The largest NVLink domain in use, one NVL72 rack.
  static constexpr uint32 kMaxRanks = 72;

  uint64 base;               // address of this rank's arena
  int64 offsets[kMaxRanks];  // arena of rank r minus base, as this rank loads and stores it; 0 for itself
  uint32 rank;
  uint32 num_ranks;

  // Element (index...) of the region whose accessor is `Accessor`, in the arena of `peer`.
  template <auto Accessor, typename... Index>
  MEGAMOE_HOST_DEVICE auto at(uint32 peer, Index... index) const {
    return Accessor(reinterpret_cast<uint8*>(base + offsets[peer]), static_cast<uint64>(index)...);
  }
};

}  // namespace megamoe
