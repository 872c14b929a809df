// swiglu_quantize: rows of I gate and I up channels -> clamp, gate, row weight -> E4M3 with UE8M0 scales as in quantize_tokens.cuh.
#pragma once

#include <megamoe/kernels/quantize_tokens.cuh>
#include <megamoe/swiglu.cuh>

namespace megamoe {

struct SwigluQuantizeParams {
  const void* gate_up;      // [num_rows, 2 * num_channels] T, at a multiple of 16 bytes
  const float* row_weight;  // [num_rows], or null
  QuantizedRows out;
  float limit;              // infinite: no clamp
  float alpha, up_bias;     // 1 and 0: silu(gate) * up
};

template <class T>
struct SwigluSource {
  struct Raw {
    Packed<T> gate, up;
  };
  const SwigluQuantizeParams& p;

  struct Row {
    const Packed<T>* gate;
    const Packed<T>* up;
    float weight;
    SwigluGate gated;

    MEGAMOE_DEVICE Raw load(uint32 vector) const { return {gate[vector], up[vector]}; }

    MEGAMOE_DEVICE Channels values(const Raw& raw) const {
      Channels g = raw.gate.unpack();
      const Channels u = raw.up.unpack();
#pragma unroll
      for (uint32 i = 0; i < 8; ++i) g.v[i] = gated(g.v[i], u.v[i]) * weight;
      return g;
    }
  };

  MEGAMOE_DEVICE Row row(uint32 row_idx) const {
    const uint32 num_vectors = p.out.num_channels / 8;
    const auto* gate = static_cast<const Packed<T>*>(p.gate_up) + uint64(row_idx) * 2 * num_vectors;
    return {gate, gate + num_vectors, p.row_weight == nullptr ? 1.0f : p.row_weight[row_idx], {p.limit, p.alpha, p.up_bias}};
  }
};

template <class T, uint32 kGroup>
MEGAMOE_DEVICE void swiglu_quantize(const SwigluQuantizeParams& p) {
  quantize<kGroup>(SwigluSource<T>{p}, p.out);
}

}  // namespace megamoe
