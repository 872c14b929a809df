// What the programs with threads share: an end for a run that hangs, calls of all ranks.
#pragma once

#include <unistd.h>

#include "arguments.hpp"
#include "block.hpp"

namespace protocol {

// SIGALRM ends the process: a wait that ignores its deadline, or threads that wait for each other in a block.
inline void end_after(uint32 seconds) { alarm(seconds); }

// A call that nothing disturbs, checked word by word.
inline void expect_y(const Call& call) {
  const Inputs in = call.inputs();
  const int64* reports = call.memory.reports;
  expect(!call.calls.is_failed(in.epoch), "rank %u call %lld failed; reports %llx %llx, %llx %llx", call.rank, in.epoch, reports[0],
         reports[1], reports[2], reports[3]);
  for (uint32 token = 0; token < in.num_tokens(); ++token) {
    uint32 y[kHidden];
    expect_token(in, token, y);
    for (uint32 i = 0; i < kHidden; ++i)
      expect(call.memory.y[token][i] == y[i], "rank %u call %lld token %u column %u: %x instead of %x", call.rank, in.epoch, token, i,
             call.memory.y[token][i], y[i]);
  }
}

// One thread per rank, with its number.
template <class Run>
void on_all_ranks(const World& world, Run run) {
  std::vector<std::thread> threads;
  for (uint32 r = 0; r < world.num_ranks; ++r)
    threads.emplace_back([&run, r] {
      current_rank = r;
      run(r);
    });
  for (std::thread& thread : threads) thread.join();
}

inline void run_call(Call& call) {
  call.stage();
  call.route(draw_shape(call.world, call.rank, call.calls.epoch()));
  run_experts(call);
}

inline void run_good_calls(const World& world, uint32 num_calls) {
  on_all_ranks(world, [&](uint32 r) {
    Delays delays{mix(world.seed, r, 9)};
    Call call(world, r);
    for (uint32 i = 0; i < num_calls; ++i) {
      delays.pause();
      run_call(call);
      expect_y(call);
    }
  });
}

}  // namespace protocol
