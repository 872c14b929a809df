"""FP4 weights as the sm_90a main loop reads them: canonical FP4Weight [E, N, K] <-> Sm90Weight.

A storage unit is 64 rows x 128 K = 4352 contiguous bytes: 4096 B of codes in wgmma fragment order, then 256 B of group
exponents. Row 16w + 8h + g of a unit belongs to warp w of 4, row half h, lane group g of 8; column 32j + 16u + 4t + i to k32 step j,
column half u, thread t of 4, element i. In step j, lane 4g + t of warp w multiplies registers a[h + 2u], one element i per byte.

In thread order (formats/thread_order.py) the columns of a unit are channels 32t + 8j + 4u + i: for tokens in the same order, and a main
loop that builds one lookup table per row instead of four.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.errors import FormatError
from megamoe.formats import gate_up
from megamoe.formats.checks import require
from megamoe.formats.fp4_weight import GROUP, ZERO_GROUP_SCALE, FP4Weight
from megamoe.formats.thread_order import from_thread_order, to_thread_order

UNIT_ROWS = 64
UNIT_K = 128
CODE_BYTES = 4096
UNIT_BYTES = CODE_BYTES + 256

# FP4 * 2^(e - 14) is E5M2 with every non-zero code normal for e in 1..27: what the main loop's arithmetic lookup table needs.
MIN_EXPONENT = 1
WINDOW = 27
# scale byte = e - MIN_EXPONENT + row_base, so FP4 * 2^(scale - 127) = FP4 * 2^(e - 14) * 2^(row_base - 114).
ROW_BASE_BIAS = 114

_MAGNITUDES = 0x77  # of the two codes of a byte
_SIGN_LOW, _SIGN_HIGH = 0x08, 0x80


@dataclass(frozen=True, eq=False)
class Sm90Weight:
    """FP4 weights in kernel order: value = FP4 * 2^(e - 14) * 2^(row_base - 114), e = exponent byte of the group, 1..27.

    Args:
        blocks: [E, ceil(N/64), ceil(K/128), 4352] uint8, one storage unit each. Padding rows and columns are zero weights.
        row_base: [E, 64 * ceil(N/64)] uint8, in kernel row order: the smallest scale byte among the row's non-zero groups; 114 (a
            factor of 1) for a row of zeros.
        shape: (E, N, K) without padding.
        interleaved: kernel rows are slabs of 8 gate rows and the 8 matching up rows.
        thread_order: columns are in thread order, as mega_moe wants them where it stages tokens so. The GEMM ops take natural order.
    """

    blocks: Tensor
    row_base: Tensor
    shape: torch.Size
    interleaved: bool
    thread_order: bool = False

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def num_bytes(self) -> int:
        return self.blocks.nbytes + self.row_base.nbytes

    @cached_property
    def storage_key(self) -> tuple:
        """What launches on these tensors depend on: addresses, sizes, dtypes, orders."""
        blocks, base = self.blocks, self.row_base
        return (blocks.data_ptr(), blocks.shape, blocks.dtype, base.data_ptr(), base.shape, base.dtype, self.shape, self.interleaved,
                self.thread_order)

    def to(self, device: torch.device | str) -> "Sm90Weight":
        return replace(self, blocks=self.blocks.to(device), row_base=self.row_base.to(device))

    def unpack(self) -> FP4Weight:
        """The canonical weight, exactly, except that all-zero groups get the canonical scale byte."""
        num_experts, n, k = self.shape
        codes = torch.empty(num_experts, n, k // 2, dtype=torch.uint8, device=self.device)
        scales = torch.empty(num_experts, n, k // GROUP, dtype=torch.uint8, device=self.device)
        for expert in range(num_experts):
            units = self.blocks[expert]  # [row blocks, k blocks, 4352]
            rows = _codes_from_units(units[..., :CODE_BYTES], self.thread_order)[:n, : k // 2]
            exponents = _exponents_from_units(units[..., CODE_BYTES:], self.thread_order)[:n, : k // GROUP]
            scale = exponents - MIN_EXPONENT + self.row_base[expert, :n, None]
            scale = scale.masked_fill(~_nonzero_groups(rows), ZERO_GROUP_SCALE)
            codes[expert] = gate_up.deinterleave(rows) if self.interleaved else rows
            scales[expert] = gate_up.deinterleave(scale) if self.interleaved else scale
        return FP4Weight(codes, scales, check_nan=False)


def pack(weight: FP4Weight, interleave_gate_up: bool, thread_order: bool = False) -> Sm90Weight:
    """Bring weights into the order of the sm_90a main loop.

    Args:
        weight: [E, N, K].
        interleave_gate_up: N = 2I rows are I gate rows, then I up rows, and are interleaved by 8.
        thread_order: put columns in thread order.

    Returns:
        Sm90Weight on the same device; `unpack()` is the inverse.

    Raises:
        FormatError: the exponents of a row's non-zero groups span more than 27 steps, or the shape does not fit.

    Sync: reads the device once per expert.
    """
    op = "layout_sm90.pack"
    require(len(weight.shape) == 3, op, "weight", "[E, N, K]", list(weight.shape), "add a leading expert dim")
    num_experts, n, k = weight.shape
    if interleave_gate_up:
        gate_up.require_rows(op, n)
    pad_rows, pad_k = -n % UNIT_ROWS, -k % UNIT_K
    num_units = ((n + pad_rows) // UNIT_ROWS, (k + pad_k) // UNIT_K)
    blocks = torch.empty(num_experts, *num_units, UNIT_BYTES, dtype=torch.uint8, device=weight.device)
    row_base = torch.empty(num_experts, n + pad_rows, dtype=torch.uint8, device=weight.device)
    # Expert by expert, so that temporaries stay the size of one expert.
    for expert in range(num_experts):
        codes = weight.codes[expert]
        exponents, base, span = _fold_scales(codes, weight.scales[expert])
        _require_window(span, expert, interleave_gate_up)
        if interleave_gate_up:
            codes, exponents, base = map(gate_up.interleave, (codes, exponents, base))
        exponents = F.pad(exponents, (0, pad_k // GROUP, 0, pad_rows), value=MIN_EXPONENT)
        blocks[expert, ..., :CODE_BYTES] = _codes_to_units(F.pad(codes, (0, pad_k // 2, 0, pad_rows)), thread_order)
        blocks[expert, ..., CODE_BYTES:] = _exponents_to_units(exponents, thread_order)
        row_base[expert] = F.pad(base, (0, pad_rows), value=ROW_BASE_BIAS)
    return Sm90Weight(blocks, row_base, weight.shape, interleave_gate_up, thread_order)


def _nonzero_groups(codes: Tensor) -> Tensor:
    """Which groups hold a non-zero weight: codes [N, K/2] uint8 -> [N, K/32] bool."""
    return (codes & _MAGNITUDES).unflatten(-1, (-1, GROUP // 2)).amax(dim=-1) != 0


def _fold_scales(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split scale bytes [N, K/32] into exponents [N, K/32] uint8 and row_base [N] uint8; also the steps each row spans [N] int32."""
    nonzero = _nonzero_groups(codes)
    lowest = scales.masked_fill(~nonzero, 255).amin(dim=-1)
    highest = scales.masked_fill(~nonzero, 0).amax(dim=-1)
    span = highest.int() - lowest.int() + 1  # [N], negative for a row of zeros
    base = lowest.masked_fill(span < 0, ROW_BASE_BIAS)
    exponents = (scales - base.unsqueeze(-1) + MIN_EXPONENT).masked_fill(~nonzero, MIN_EXPONENT)
    return exponents, base, span


def _require_window(span: Tensor, expert: int, is_gate_up: bool) -> None:
    """Raise FormatError naming the expert and the canonical row if a row spans more than WINDOW exponents."""
    widest, row = (int(x) for x in span.max(dim=0))
    if widest > WINDOW:
        half = len(span) // 2
        part = f" ({'gate' if row < half else 'up'} row {row % half})" if is_gate_up else ""
        raise FormatError(f"layout_sm90.pack: the group exponents of a row must be within {WINDOW} steps, got {widest} in expert {expert}, "
                          f"row {row}{part}; zero its smallest groups or run precision='bf16'")


def _codes_to_units(codes: Tensor, thread_order: bool) -> Tensor:
    """Canonical codes of one expert [N, K/2] -> [N/64, K/128, 4096] uint8 in fragment order.

    A 32-bit word holds the 8 weights of (row half h, step j): 4 of column half u = 0, 4 of u = 1. Its nibbles are the magnitudes in that
    order; the bit above each magnitude is a sign, bit 8i + 7 of element i of u = 0 and bit 8i + 3 of element i of u = 1, so that both
    register halves take their signs with one AND.
    """
    if thread_order:
        codes = to_thread_order(codes.contiguous().view(torch.int16)).view(torch.uint8)
    tiles = codes.view(-1, 4, 2, 8, codes.shape[1] // 64, 2, 2, 2, 4, 2)  # [row block, w, h, g, k block, j/2, j%2, u, t, byte]
    lo, hi = tiles.unbind(dim=7)
    (c0, c1), (d0, d1) = lo.unbind(dim=-1), hi.unbind(dim=-1)  # elements (0, 1) and (2, 3), low nibble first
    word = torch.stack((
        c0 & _MAGNITUDES | (c0 & _SIGN_LOW) << 4 | d0 & _SIGN_LOW,
        c1 & _MAGNITUDES | c0 & _SIGN_HIGH | (d0 & _SIGN_HIGH) >> 4,
        d0 & _MAGNITUDES | (c1 & _SIGN_LOW) << 4 | d1 & _SIGN_LOW,
        d1 & _MAGNITUDES | c1 & _SIGN_HIGH | (d1 & _SIGN_HIGH) >> 4,
    ), dim=-1)  # [row block, w, h, g, k block, j/2, j%2, t, 4 bytes]
    # Two 16-byte loads per thread, j/2 = 0 and 1, each lane-consecutive: free of bank conflicts.
    return word.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(tiles.shape[0], tiles.shape[4], CODE_BYTES)


def _codes_from_units(units: Tensor, thread_order: bool) -> Tensor:
    """The inverse of `_codes_to_units`: [row blocks, k blocks, 4096] -> [N, K/2] uint8."""
    num_row_blocks, num_k_blocks = units.shape[:2]
    word = units.reshape(num_row_blocks, num_k_blocks, 2, 4, 8, 4, 2, 2, 4).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    b0, b1, b2, b3 = word.unbind(dim=-1)  # each [row block, w, h, g, k block, j/2, j%2, t]
    lo = torch.stack((
        b0 & _MAGNITUDES | (b0 & _SIGN_HIGH) >> 4 | b1 & _SIGN_HIGH,
        b1 & _MAGNITUDES | (b2 & _SIGN_HIGH) >> 4 | b3 & _SIGN_HIGH,
    ), dim=-1)
    hi = torch.stack((
        b2 & _MAGNITUDES | b0 & _SIGN_LOW | (b1 & _SIGN_LOW) << 4,
        b3 & _MAGNITUDES | b2 & _SIGN_LOW | (b3 & _SIGN_LOW) << 4,
    ), dim=-1)
    codes = torch.stack((lo, hi), dim=-3).reshape(num_row_blocks * UNIT_ROWS, num_k_blocks * UNIT_K // 2)
    return from_thread_order(codes.view(torch.int16)).view(torch.uint8) if thread_order else codes


def _exponents_to_units(exponents: Tensor, thread_order: bool) -> Tensor:
    """Exponents of one expert [N, K/32] -> [N/64, K/128, 256] uint8: 8 bytes per (w, g), steps j of half 0, then of half 1; in thread order
    the two halves of thread 0, of thread 1, ..., each of which has one group."""
    tiles = exponents.view(-1, 4, 2, 8, exponents.shape[1] // 4, 4)  # [row block, w, h, g, k block, j or t]
    order = (0, 4, 1, 3, 5, 2) if thread_order else (0, 4, 1, 3, 2, 5)
    return tiles.permute(order).reshape(tiles.shape[0], tiles.shape[4], 256)


def _exponents_from_units(units: Tensor, thread_order: bool) -> Tensor:
    """The inverse of `_exponents_to_units`: [row blocks, k blocks, 256] -> [N, K/32] uint8."""
    num_row_blocks, num_k_blocks = units.shape[:2]
    if thread_order:
        tiles = units.reshape(num_row_blocks, num_k_blocks, 4, 8, 4, 2).permute(0, 2, 5, 3, 1, 4)
    else:
        tiles = units.reshape(num_row_blocks, num_k_blocks, 4, 8, 2, 4).permute(0, 2, 4, 3, 1, 5)
    return tiles.reshape(num_row_blocks * UNIT_ROWS, num_k_blocks * 4)
