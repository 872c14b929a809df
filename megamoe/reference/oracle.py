"""The FP64 oracle of a whole MoE layer: all experts in one process, written from the numerics contract alone.

It shares no code with formats, engines or kernels: its number formats are enumerated tables of values, its rounding is a search in them. It
repeats the two quantisations of the contract (steps 1 and 4) and does everything else in FP64, so that an engine that agrees with it up to
accumulation order and BF16 rounding is right.

Legend: T tokens, K top-k slots, E experts, H hidden, I intermediate, r rows of one expert, N and M the sizes of one weight.
"""

import torch

PRECISIONS = ("fp8xfp4", "fp8xfp8", "bf16", "fp32")
ROW_CHUNK = 2048  # rows quantised or multiplied at once: bounds the temporaries
X_GROUP = 32
MIN_AMAX = 1e-4
E4M3_MAX = 448.0
BLOCK = 128  # side of the weight blocks that share one FP8 scale
FP4_GROUP = 32  # K values that share one FP4 scale

E4M3_POSITIVE = torch.tensor(
    [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    + [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)][:-1],
    dtype=torch.float64,
)  # [127], indexed by the code without its sign; code 127 is NaN
E4M3_MIDPOINTS = (E4M3_POSITIVE[1:] + E4M3_POSITIVE[:-1]) / 2  # [126]
UE8M0_VALUES = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan], dtype=torch.float64)  # [256]
E2M1_POSITIVE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)  # [8]

Weight = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def moe_oracle(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    precision: str,
    act_group: int | str,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    swiglu_up_bias: float = 0.0,
    quantized: bool = True,
) -> torch.Tensor:
    """Compute the layer in FP64.

    Args:
        x: [T, H] BF16 or FP32.
        topk_idx: [T, K] integer expert ids; a slot outside [0, E) contributes nothing.
        topk_weights: [T, K] float.
        gate_up: [E, 2I, H] float, taken as it is, or (codes, scales): uint8 E2M1 pairs [E, 2I, H/2] with uint8 UE8M0 [E, 2I, H/32], or
            float8_e4m3fn [E, 2I, H] with uint8 UE8M0 or float32 [E, ceil(2I/128), ceil(H/128)].
        down: [E, H, I], likewise.
        gate_up_bias: [E, 2I] float.
        down_bias: [E, H] float.
        precision: "fp8xfp4" or "fp8xfp8": x and a are quantised. "bf16": x, float weights and a are rounded to BF16. "fp32": nothing is.
        act_group: channels of a that share one scale, 32, 64, 96, 128 or "token"; used by the fp8 precisions.
        swiglu_limit: as in MoEConfig, like the next two.
        swiglu_alpha: see swiglu_limit.
        swiglu_up_bias: see swiglu_limit.
        quantized: False gives the layer on x and weights as given, rounding nothing.

    Returns:
        [T, H] float64. A token of x that holds NaN or Inf and uses at least one expert is all NaN.

    Raises:
        ValueError: precision is none of these.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"moe_oracle: precision must be one of {PRECISIONS}, got {precision!r}; pick one of them")
    rounding = precision if quantized else "fp32"
    x = torch.where(x.isfinite(), x, torch.nan)
    x = _round_activation(x, rounding, X_GROUP)  # [T, H] float64
    num_experts = _codes_of(gate_up).shape[0]
    y = torch.zeros_like(x)
    is_routed = (topk_idx >= 0) & (topk_idx < num_experts)
    for expert in topk_idx[is_routed].unique().tolist():
        w_gate_up = _expert_weight(gate_up, expert, rounding)  # [2I, H] float64
        w_down = _expert_weight(down, expert, rounding)  # [H, I] float64
        tokens, slots = torch.where(topk_idx == expert)
        for token, slot in zip(tokens.split(ROW_CHUNK), slots.split(ROW_CHUNK)):
            weight = topk_weights[token, slot].double()[:, None]  # [r, 1]
            h = x[token] @ w_gate_up.T  # [r, 2I]
            if gate_up_bias is not None:
                h = h + gate_up_bias[expert].double()
            a = weight * _gated(h, swiglu_limit, swiglu_alpha, swiglu_up_bias)  # [r, I]
            partial = _round_activation(a, rounding, act_group) @ w_down.T  # [r, H]
            if down_bias is not None:
                partial = partial + weight * down_bias[expert].double()
            y.index_add_(0, token, partial)
    return y


def quantize_e4m3(x: torch.Tensor, group: int | str) -> torch.Tensor:
    """Round each group of x [r, C] to E4M3 times one power of two and return the rounded values, [r, C] float64.

    The power of two is the smallest that brings the group's largest magnitude, taken as at least 1e-4, to 448 or less. NaN and Inf become
    NaN and do not count as largest. The last group of a row may be short.
    """
    num_channels = x.shape[1]
    width = num_channels if group == "token" else group
    x = torch.nn.functional.pad(x.double(), (0, -num_channels % width)).unflatten(1, (-1, width))  # [r, groups, width]
    finite = torch.where(x.isfinite(), x, 0.0)
    fraction, exponent = torch.frexp(finite.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / E4M3_MAX)
    exponent = torch.where(fraction > 0.5, exponent, exponent - 1)  # ceil(log2): frexp's fraction of a power of two is exactly 1/2
    scale = decode_ue8m0(exponent + 127)
    midpoints, values = E4M3_MIDPOINTS.to(x.device), E4M3_POSITIVE.to(x.device)
    magnitude = finite.abs() / scale
    # The two searches differ only on a tie; there the even code is the one with the even mantissa.
    below, above = torch.bucketize(magnitude, midpoints), torch.bucketize(magnitude, midpoints, right=True)
    rounded = values[torch.where(below % 2 == 0, below, above)] * scale
    return torch.where(x.isfinite(), torch.copysign(rounded, x), torch.nan).flatten(1)[:, :num_channels]


def decode_e2m1(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values [N, K] float64 of E2M1 pairs [N, K/2], low nibble first, with one UE8M0 scale per 32 values [N, K/32]."""
    nibbles = torch.stack((codes % 16, codes // 16), dim=-1).flatten(-2).long()  # [N, K]
    values = torch.cat((E2M1_POSITIVE, -E2M1_POSITIVE)).to(codes.device)[nibbles]
    return values * decode_ue8m0(scales).repeat_interleave(FP4_GROUP, dim=-1)


def decode_e4m3(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values [N, K] float64 of E4M3 codes [N, K] with one scale per 128 x 128 block, UE8M0 bytes or float32 [ceil(N/128), ceil(K/128)]."""
    nan = torch.full((1,), torch.nan, dtype=torch.float64)
    table = torch.cat((E4M3_POSITIVE, nan, -E4M3_POSITIVE, nan)).to(codes.device)  # [256]
    scales = decode_ue8m0(scales) if scales.dtype == torch.uint8 else scales.double()
    blocks = scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return table[codes.view(torch.uint8).long()] * blocks[: codes.shape[0], : codes.shape[1]]


def decode_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) in float64; byte 255 is NaN."""
    return UE8M0_VALUES.to(scales.device)[scales.long()]


def _round_activation(x: torch.Tensor, rounding: str, group: int | str) -> torch.Tensor:
    """x [r, C] as the next linear reads it, in float64."""
    if rounding == "fp32":
        return x.double()
    if rounding == "bf16":
        return x.bfloat16().double()
    if not x.shape[0]:
        return x.double()
    return torch.cat([quantize_e4m3(rows, group) for rows in x.split(ROW_CHUNK)])


def _expert_weight(weight: Weight, expert: int, rounding: str) -> torch.Tensor:
    """One expert's matrix in float64."""
    if isinstance(weight, tuple):
        codes, scales = weight
        decode = decode_e2m1 if codes.dtype == torch.uint8 else decode_e4m3
        return decode(codes[expert], scales[expert])
    return weight[expert].bfloat16().double() if rounding == "bf16" else weight[expert].double()


def _codes_of(weight: Weight) -> torch.Tensor:
    return weight[0] if isinstance(weight, tuple) else weight


def _gated(h: torch.Tensor, limit: float | None, alpha: float | None, up_bias: float) -> torch.Tensor:
    """Gate rows first, up rows second: h [r, 2I] -> [r, I]."""
    gate, up = h.chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if alpha is None:
        return gate / (1 + torch.exp(-gate)) * up
    return gate / (1 + torch.exp(-alpha * gate)) * (up + up_bias)
