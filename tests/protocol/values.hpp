// The layer as integers: what a call's inputs are and what must come out. Every value depends on the call, the rank, the token and the
// expert, so that a row that is stale, lost or in the wrong place shows in y.
#pragma once

#include "world.hpp"

namespace protocol {

template <class... Value>
uint32 mix(Value... values) {
  uint64 h = 0x9e3779b97f4a7c15ull;
  ((h = (h ^ static_cast<uint64>(values)) * 0xbf58476d1ce4e5b9ull, h ^= h >> 29), ...);
  return static_cast<uint32>(h ^ h >> 32);
}

inline uint32 mix_row(const uint32* row, uint32 count) {
  uint32 h = 0;
  for (uint32 i = 0; i < count; ++i) h = mix(h, row[i]);
  return h;
}

// The inputs of rank `rank` in call `epoch`.
struct Inputs {
  const World& world;
  int64 epoch;
  uint32 rank;

  // Every kind of call: full, uneven, some ranks without tokens, no tokens at all.
  uint32 num_tokens() const {
    const uint32 kind = mix(world.seed, epoch, 1) % 5, draw = mix(world.seed, epoch, rank, 2);
    if (kind == 0) return kMaxTokens;
    if (kind == 1) return draw % 2 ? 0 : 1 + draw / 2 % kMaxTokens;
    if (kind == 2 && mix(world.seed, epoch, 3) % 4 == 0) return 0;
    return draw % (kMaxTokens + 1);
  }
  // Uniform, all slots to one expert, or a few experts; -1 now and then.
  int64 expert(uint32 token, uint32 slot) const {
    const uint32 kind = mix(world.seed, epoch, 4) % 4, draw = mix(world.seed, epoch, rank, token, slot);
    if (draw % 7 == 0) return -1;
    if (kind == 0) return mix(world.seed, epoch, 5) % kNumExperts;
    return draw / 7 % (kind == 1 ? 2 : kNumExperts);
  }
  uint32 weight(uint32 token, uint32 slot) const { return mix(world.seed, epoch, rank, token, slot, 6); }
  uint32 x(uint32 token, uint32 column) const { return mix(world.seed, epoch, rank, token, column, 7); }
};

inline uint32 linear1(uint32 expert, uint32 column, const uint32* x, uint32 weight) {
  return mix(expert, column, mix_row(x, kHidden), weight);
}
inline void fold(uint32* a) {
  const uint32 of_row = mix_row(a, kIntermediate);
  for (uint32 i = 0; i < kIntermediate; ++i) a[i] = mix(a[i], of_row);
}
inline uint32 linear2(uint32 expert, uint32 column, const uint32* a) { return mix(expert, column, mix_row(a, kIntermediate)); }

// What y must be for one token.
inline void expect_token(const Inputs& inputs, uint32 token, uint32* y) {
  std::memset(y, 0, kHidden * sizeof(uint32));
  for (uint32 slot = 0; slot < kTopk; ++slot) {
    const int64 expert = inputs.expert(token, slot);
    if (expert < 0) continue;
    uint32 x[kHidden], a[kIntermediate];
    for (uint32 i = 0; i < kHidden; ++i) x[i] = inputs.x(token, i);
    for (uint32 i = 0; i < kIntermediate; ++i) a[i] = linear1(expert, i, x, inputs.weight(token, slot));
    fold(a);
    for (uint32 i = 0; i < kHidden; ++i) y[i] += linear2(expert, i, a);
  }
}

}  // namespace protocol
