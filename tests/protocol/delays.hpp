// Random pauses of a thread, so that schedules differ from seed to seed.
#pragma once

#include <chrono>
#include <thread>

#include "values.hpp"

namespace protocol {

struct Delays {
  uint32 state;

  void pause() {
    state = mix(state, 11);
    if (state % 4 == 0)
      for (uint32 i = state / 4 % 8; i > 0; --i) std::this_thread::yield();
    if (state % 64 == 1) std::this_thread::sleep_for(std::chrono::microseconds(state / 64 % 200));
  }
};

inline void wait_briefly() { std::this_thread::yield(); }

}  // namespace protocol
