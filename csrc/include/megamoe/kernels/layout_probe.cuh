// layout_probe: proves that a kernel and torch mean the same element. One thread writes the first and the last element of every region in
// the arena of rank `peer`: the regions, in the order of Layout, get 1 and 2, 3 and 4, ... A test reads them back through the torch views.
#pragma once

#include <megamoe/comm/symm.cuh>

namespace megamoe {

// The probed value in the storage of T: floats as a number, storage-only types as their bits.
template <typename T>
MEGAMOE_HOST_DEVICE void put(T* element, uint32 value) {
  *element = static_cast<T>(value);
}

// `Probe` calls visit(first, last) for every region: generated next to Layout, since the regions differ per precision.
template <typename Probe>
__global__ void layout_probe(const __grid_constant__ Symm symm, uint32 peer) {
  uint32 value = 0;
  Probe::for_each_region(symm, peer, [&](auto* first, auto* last) {
    put(first, ++value);
    put(last, ++value);
  });
}

}  // namespace megamoe
