// The machine as protocols between warps, blocks and ranks see it: atomics with their order and scope, time, pauses. One PTX instruction
// each on the device, std::atomic_ref on the host, where the same headers run as threads under ThreadSanitizer (tests/protocol).
//
// Order is part of every access: a bare fence would be invisible to ThreadSanitizer. Scope is in the name: `gpu` for words that only
// threads of one rank touch, `sys` for words that ranks share; the host run checks that.
#pragma once

#ifdef __CUDACC__

#include <megamoe/ptx/memory.cuh>
#include <megamoe/ptx/timer.cuh>

namespace megamoe::machine {

using ptx::add_acq_rel_gpu;
using ptx::add_relaxed_gpu;
using ptx::add_release_gpu;
using ptx::global_timer_ns;
using ptx::ld_acquire_gpu;
using ptx::ld_acquire_sys;
using ptx::ld_relaxed_gpu;
using ptx::max_release_gpu;
using ptx::nanosleep;
using ptx::st_release_sys;

}  // namespace megamoe::machine

#else

#include <atomic>
#include <chrono>
#include <thread>

#include <megamoe/base.cuh>

namespace megamoe::machine {

enum class Scope { kGpu, kSys };

// Called before every access; defined by the program that includes this.
void observe(const void* address, Scope scope);

template <class T>
std::atomic_ref<T> word(const T* address, Scope scope) {
  observe(address, scope);
  return std::atomic_ref<T>(*const_cast<T*>(address));
}

inline uint32 ld_acquire_gpu(const uint32* address) { return word(address, Scope::kGpu).load(std::memory_order_acquire); }
inline int64 ld_acquire_gpu(const int64* address) { return word(address, Scope::kGpu).load(std::memory_order_acquire); }
inline int64 ld_acquire_sys(const int64* address) { return word(address, Scope::kSys).load(std::memory_order_acquire); }
inline int64 ld_relaxed_gpu(const int64* address) { return word(address, Scope::kGpu).load(std::memory_order_relaxed); }
inline void st_release_sys(int64* address, int64 v) { word(address, Scope::kSys).store(v, std::memory_order_release); }
inline void add_release_gpu(uint32* address, uint32 v) { word(address, Scope::kGpu).fetch_add(v, std::memory_order_release); }
inline uint32 add_acq_rel_gpu(uint32* address, uint32 v) { return word(address, Scope::kGpu).fetch_add(v, std::memory_order_acq_rel); }
inline uint32 add_relaxed_gpu(uint32* address, uint32 v) { return word(address, Scope::kGpu).fetch_add(v, std::memory_order_relaxed); }

inline int64 max_release_gpu(int64* address, int64 v) {
  const auto it = word(address, Scope::kGpu);
  int64 old = it.load(std::memory_order_relaxed);
  while (old < v && !it.compare_exchange_weak(old, v, std::memory_order_release, std::memory_order_relaxed)) {
  }
  return old;
}

inline uint64 global_timer_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline void nanosleep(uint32) { std::this_thread::yield(); }

}  // namespace megamoe::machine

#endif
