"""C++ text of the wgmma instruction for one token count. Generated, since its operand list has one entry per accumulator register."""


def wgmma_e5m2_e4m3(num_tokens: int) -> str:
    """The specialisation of ptx::WgmmaE5m2E4m3 for m64nNk32 with N = num_tokens, A in registers, FP32 sums."""
    n = num_tokens // 2
    sums = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""\
template <>
struct megamoe::ptx::WgmmaE5m2E4m3<{num_tokens}> {{
  static MEGAMOE_DEVICE void mma(float (&d)[{n}], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint64 b, uint32 accumulate) {{
    asm volatile(
        "{{.reg .pred p; setp.ne.b32 p, %{n + 5}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{num_tokens}k32.f32.e5m2.e4m3 {{{sums}}}, "
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, p, 1, 1;}}"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
  }}
}};
"""
