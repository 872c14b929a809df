// Shared memory: addresses, vector loads and stores, 8x8 matrix stores. One function per instruction (PTX ISA, "Data Movement").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE uint32 shared_address(const void* pointer) { return static_cast<uint32>(__cvta_generic_to_shared(pointer)); }

struct Words2 { uint32 x, y; };
struct Words4 { uint32 x, y, z, w; };

MEGAMOE_DEVICE Words4 ld_shared_128(uint32 address) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

MEGAMOE_DEVICE Words2 ld_shared_64(uint32 address) {
  Words2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

MEGAMOE_DEVICE void st_shared_128(uint32 address, Words4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

MEGAMOE_DEVICE uint32 ld_shared_32(uint32 address) {
  uint32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// Of 16 bits.
MEGAMOE_DEVICE uint32 ld_shared_16(uint32 address) {
  uint32 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

MEGAMOE_DEVICE float ld_shared_float(uint32 address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}

MEGAMOE_DEVICE void st_shared_float(uint32 address, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory"); }

MEGAMOE_DEVICE void st_shared_byte(uint32 address, uint32 v) {
  asm volatile("{.reg .b16 h; cvt.u16.u32 h, %1; st.shared.b8 [%0], h;}" ::"r"(address), "r"(v) : "memory");
}

// Stores two 8x8 matrices of 16-bit elements transposed: lane l < 16 gives the address of row l % 8 of matrix l / 8.
MEGAMOE_DEVICE void stmatrix_x2_trans(uint32 row_address, uint32 m0, uint32 m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(row_address), "r"(m0), "r"(m1) : "memory");
}

// The inverse of stmatrix_x2_trans.
MEGAMOE_DEVICE Words2 ldmatrix_x2_trans(uint32 row_address) {
  Words2 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(row_address) : "memory");
  return v;
}

}  // namespace megamoe::ptx
