// What kernels tell the host about values that only the device has seen (megamoe/kernels/device_errors.py reads it).
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

// Slot `kind` of both arrays belongs to one kind of error of one op.
struct DeviceErrors {
  uint64* first;  // device memory: index << 32 | value of the offender with the smallest index; all ones for none
  uint32* flags;  // host memory: 1 once there is one

  // The flag is a plain store, so it needs no atomics across PCIe; it follows the record that it announces.
  MEGAMOE_DEVICE void report(uint32 kind, uint32 index, int64 value) const {
    const int64 smallest = -0x80000000ll, largest = 0x7fffffffll;
    const int32 shown = static_cast<int32>(value < smallest ? smallest : value > largest ? largest : value);
    atomicMin(first + kind, static_cast<uint64>(index) << 32 | static_cast<uint32>(shown));
    __threadfence_system();
    *reinterpret_cast<volatile uint32*>(flags + kind) = 1;
  }
};

// Kinds, in the order of device_errors.py.
enum GroupingError : uint32 { kIndexOutOfRange, kRowsApart, kOffsetOutOfRange, kCountOutOfRange, kRowOutOfRange, kSlotOutOfRange };

}  // namespace megamoe
