"""One case of the GEMM benchmark on the GPU: random operands, launches of fp4_gemm, comparison with the plain-torch twin.

Legend: G groups, n weight rows, k input channels, M rows of x over all groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_gemm_cases import Case

from megamoe.formats import QuantizedTokens, quantize_tokens
from megamoe.formats.layout_sm90 import CODE_BYTES, ROW_BASE_BIAS, UNIT_BYTES, UNIT_K, UNIT_ROWS, Sm90Weight
from megamoe.kernels.fp4_gemm import fp4_gemm
from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig
from megamoe.reference.swiglu import swiglu
from megamoe.testing.bench import num_buffers
from megamoe.testing.compare import assert_gemm_accepted

CHECKED_ROWS = 256  # of each checked group
EXPONENTS = (11, 16)  # FP4 * 2^(e - 14): weights between 1/16 and 12


@dataclass(frozen=True)
class Operands:
    """What every contender of a case works on."""

    counts: list[int]
    x: QuantizedTokens  # [M, k], group "token"
    weights: list[Sm90Weight]  # [G, n, k], the same work on different bytes
    grouping: dict[str, object]  # keyword arguments of fp4_gemm
    begins: list[int]  # first row of each group


def make_operands(case: Case, seed: int = 0, device: str = "cuda") -> Operands:
    """Random tokens whose exponents differ by up to 8 steps, random weights, and the rows of the groups."""
    counts = case.draw(seed)
    g = torch.Generator(device).manual_seed(seed)
    is_packed = case.op in ("dense", "contiguous")
    stride = 0 if is_packed else max(1, max(counts))
    begins = [sum(counts[:i]) if is_packed else i * stride for i in range(case.num_groups)]
    num_rows = sum(counts) if is_packed else case.num_groups * stride
    scale = torch.randint(-4, 5, (num_rows, 1), device=device, generator=g).float().exp2() / case.k**0.5
    x = quantize_tokens(torch.randn(num_rows, case.k, device=device, generator=g) * scale, "token")
    first = random_weight(case.num_groups, case.n, case.k, case.op == "swiglu", g, device)
    weights = [first, *(random_weight(case.num_groups, case.n, case.k, case.op == "swiglu", g, device)
                        for _ in range(num_buffers(first.num_bytes) - 1))]
    ints = torch.tensor([*begins, num_rows] if is_packed else counts, dtype=torch.int32, device=device)
    grouping = {} if case.op == "dense" else {"offsets": ints} if is_packed else {"counts": ints}
    return Operands(counts, x, weights, grouping, begins)


def random_weight(num_groups: int, n: int, k: int, interleaved: bool, g: torch.Generator, device: str) -> Sm90Weight:
    """Random units in kernel order: every code byte is a pair of FP4 values, exponents spread a few steps."""
    units = (num_groups, -(-n // UNIT_ROWS), -(-k // UNIT_K))
    blocks = torch.randint(0, 256, (*units, UNIT_BYTES), dtype=torch.uint8, device=device, generator=g)
    blocks[..., CODE_BYTES:] = torch.randint(*EXPONENTS, (*units, UNIT_BYTES - CODE_BYTES), dtype=torch.uint8, device=device, generator=g)
    row_base = torch.full((num_groups, units[1] * UNIT_ROWS), ROW_BASE_BIAS, dtype=torch.uint8, device=device)
    return Sm90Weight(blocks, row_base, torch.Size((num_groups, n, k)), interleaved)


def make_launches(case: Case, operands: Operands, config: Fp4GemmConfig) -> tuple[list[Callable[[], object]], dict[str, torch.Tensor]]:
    """One launch per weight buffer, and the outputs that all of them write, poisoned."""
    num_rows, device = operands.x.shape[0], operands.x.device
    if case.op == "swiglu":
        outputs = {"a_codes": torch.full((num_rows, case.n // 2), torch.nan, device=device).to(torch.float8_e4m3fn),
                   "a_sf": torch.full((num_rows, case.n // 64), 255, dtype=torch.uint8, device=device)}
    else:
        outputs = {"out": torch.full((num_rows, case.n), torch.nan, dtype=torch.bfloat16, device=device)}
    arguments = {**operands.grouping, **outputs}
    x = operands.x
    launches = [lambda w=w: fp4_gemm(x.codes, x.sf, w, config, **arguments) for w in operands.weights]
    return launches, outputs


def check_outputs(case: Case, operands: Operands, launches: list[Callable[[], object]], outputs: dict[str, torch.Tensor]) -> float:
    """Compare what the first launch gives with FP64, in the first, the middle and the last group that have rows.

    Returns:
        The largest relative error.

    Raises:
        AssertionError: it exceeds 1.05 x that of the plain-torch twin.
    """
    launches[0]()
    filled = [group for group, count in enumerate(operands.counts) if count]
    return max(_check_group(case, operands, outputs, group) for group in sorted({filled[0], filled[len(filled) // 2], filled[-1]}))


def _check_group(case: Case, operands: Operands, outputs: dict[str, torch.Tensor], group: int) -> float:
    w, begin, count = operands.weights[0], operands.begins[group], operands.counts[group]
    one = Sm90Weight(w.blocks[group:group + 1], w.row_base[group:group + 1], torch.Size((1, *w.shape[1:])), w.interleaved)
    values = one.unpack().dequantize()[0]  # [n, k], gate rows first
    half = min(count, CHECKED_ROWS) // 2
    # Both ends of the group, where wrong bounds would show.
    ends = torch.arange(begin, begin + half + count % 2), torch.arange(begin + count - half, begin + count)
    rows = torch.cat(ends).unique().to(w.device)
    x = QuantizedTokens(_rows(operands.x.codes, rows), operands.x.sf[rows], "token").dequantize()
    twin, exact = x @ values.T, x.double() @ values.double().T
    if case.op != "swiglu":
        return assert_gemm_accepted(outputs["out"][rows], exact, twin.bfloat16(), context=f"{case.name}, group {group}")
    gate, up = exact.chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    twin = quantize_tokens(swiglu(*twin.chunk(2, dim=1)), 32).dequantize()
    got = QuantizedTokens(_rows(outputs["a_codes"], rows), outputs["a_sf"][rows], 32).dequantize()
    return assert_gemm_accepted(got, exact, twin, context=f"{case.name}, group {group}")


def _rows(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """codes[rows]; there is no indexing of FP8 on some versions and devices."""
    return codes.view(torch.uint8)[rows].view(codes.dtype)
