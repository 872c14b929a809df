// Types and qualifiers that every header shares. Includes nothing, so that nvcc, NVRTC and a host compiler all take it.
#pragma once

#ifdef __CUDACC__
#define MEGAMOE_HOST_DEVICE __host__ __device__ __forceinline__
#define MEGAMOE_DEVICE __device__ __forceinline__
#else
#define MEGAMOE_HOST_DEVICE inline
#define MEGAMOE_DEVICE inline
#endif

namespace megamoe {

using uint8 = unsigned char;
using int16 = short;
using uint16 = unsigned short;
using int32 = int;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

// Storage only: a number in an 8- or 16-bit float format, without arithmetic and without the header that would bring it.
enum class E4m3 : uint8 {};
enum class Bf16 : uint16 {};

MEGAMOE_HOST_DEVICE constexpr uint32 ceil_div(uint32 a, uint32 b) { return (a + b - 1) / b; }
MEGAMOE_HOST_DEVICE constexpr uint32 round_up(uint32 a, uint32 b) { return ceil_div(a, b) * b; }
MEGAMOE_HOST_DEVICE constexpr uint32 min_of(uint32 a, uint32 b) { return a < b ? a : b; }

// Ascending sizes, known when the kernel is compiled. Arrays of constants cannot be indexed in device code, packs can.
template <uint32... kValues>
struct Sizes {
  static constexpr uint32 kCount = sizeof...(kValues);

  static MEGAMOE_HOST_DEVICE constexpr uint32 at(uint32 idx) {
    uint32 i = 0, value = 0;
    ((value = i++ == idx ? kValues : value), ...);
    return value;
  }
  static MEGAMOE_HOST_DEVICE constexpr uint32 largest() { return at(kCount - 1); }

  // Index of the smallest size that is at least `needed`; the largest if none is.
  static MEGAMOE_HOST_DEVICE constexpr uint32 index_of(uint32 needed) {
    uint32 num_below = 0;
    ((num_below += kValues < needed), ...);
    return min_of(num_below, kCount - 1);
  }
};

}  // namespace megamoe
