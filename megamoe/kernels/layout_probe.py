"""Source of layout_probe: the kernel that proves that CUDA and torch agree where every region of the arena lies."""

from collections.abc import Iterator

from megamoe.comm.protocol import Layout, emit_struct


def corners(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """(region, C++ address of its first element in the arena of `peer`, C++ address of its last)."""
    for name, place in layout.placements.items():
        first = ", ".join("0" for _ in place.shape)
        last = ", ".join(f"Layout::{name}_extent_{axis} - 1" for axis in range(len(place.shape)))
        yield name, f"symm.at<&Layout::{name}>(peer, {first})", f"symm.at<&Layout::{name}>(peer, {last})"


def probe_source(layout: Layout) -> str:
    """One translation unit with layout_probe<Probe> for `layout`."""
    lines = ["#include <megamoe/kernels/layout_probe.cuh>", emit_struct(layout), "struct Probe {", "  template <typename Visit>",
             "  __device__ static void for_each_region(const megamoe::Symm& symm, megamoe::uint32 peer, Visit visit) {"]
    lines += [f"    visit({first}, {last});" for _, first, last in corners(layout)]
    lines += ["  }", "};",
              "template __global__ void megamoe::layout_probe<Probe>(const __grid_constant__ megamoe::Symm, megamoe::uint32);", ""]
    return "\n".join(lines)
