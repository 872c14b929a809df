"""Other libraries on the same shapes, where they can be imported: DeepGEMM (FP8 x FP8), cuBLAS FP8 and torch's grouped BF16 GEMM.

Operands are random bytes in the peer's own format and layout, prepared outside the timed region; weights rotate as ours do.

Legend: G groups, n weight rows, k input channels, M rows of x over all groups.
"""

import importlib.util
from collections.abc import Callable

import torch
from bench_gemm_cases import Case

from megamoe.testing.bench import num_buffers

Launches = list[Callable[[], object]]
BLOCK = 128  # channels per scale in DeepGEMM


def make_peers(case: Case, counts: list[int]) -> dict[str, Launches]:
    """Name -> launches of every peer that has this operation. What a peer raises passes through."""
    peers = {}
    if importlib.util.find_spec("deep_gemm") and case.op != "swiglu":
        peers["deep_gemm fp8"] = _deep_gemm(case, counts)
    if case.op == "dense":
        peers["cublas fp8"] = _cublas_fp8(case)
    if case.op == "contiguous":
        peers["torch grouped bf16"] = _grouped_bf16(case, counts)
    return peers


def _fp8(*shape: int) -> torch.Tensor:
    """Random finite E4M3: a sign and the codes below 2^7."""
    magnitudes, signs = (torch.randint(0, end, shape, dtype=torch.uint8, device="cuda") for end in (112, 2))
    return (magnitudes | signs << 7).view(torch.float8_e4m3fn)


def _cublas_fp8(case: Case) -> Launches:
    """One scale per tensor, fast accumulation (no promotion to FP32): its best case."""
    x, one = _fp8(case.rows, case.k), torch.ones((), device="cuda")
    weights = [_fp8(case.n, case.k) for _ in range(num_buffers(case.n * case.k))]

    def launch(w: torch.Tensor) -> object:
        return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [lambda w=w: launch(w) for w in weights]


def _grouped_bf16(case: Case, counts: list[int]) -> Launches:
    ends = torch.tensor(counts, device="cuda").cumsum(0).int()
    x = torch.randn(sum(counts), case.k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(case.num_groups, case.n, case.k, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return [lambda w=w: torch._grouped_mm(x, w.transpose(1, 2), offs=ends, out_dtype=torch.bfloat16) for w in weights]


def _deep_gemm(case: Case, counts: list[int]) -> Launches:
    """FP32 scales per 128 channels of a token and per 128 x 128 block of a weight, in the layout that its kernels read."""
    import deep_gemm

    def tokens(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        sf = torch.rand(*shape[:-1], -(-shape[-1] // BLOCK), device="cuda") + 0.5
        return _fp8(*shape), deep_gemm.get_mn_major_tma_aligned_tensor(sf)

    def weight(*groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _fp8(*groups, case.n, case.k), torch.rand(*groups, -(-case.n // BLOCK), -(-case.k // BLOCK), device="cuda") + 0.5

    groups = () if case.op == "dense" else (case.num_groups,)
    weights = [weight(*groups) for _ in range(num_buffers(case.num_groups * case.n * case.k))]
    if case.op == "dense":
        x, out = tokens(case.rows, case.k), torch.empty(case.rows, case.n, device="cuda", dtype=torch.bfloat16)
        return [lambda w=w: deep_gemm.fp8_gemm_nt(x, w, out) for w in weights]
    if case.op == "contiguous":
        padded = [-(-count // BLOCK) * BLOCK for count in counts]  # its groups begin at multiples of the row tile
        idx = torch.full((sum(padded),), -1, dtype=torch.int32, device="cuda")
        for group, count in enumerate(counts):
            begin = sum(padded[:group])
            idx[begin:begin + count] = group
        x, out = tokens(sum(padded), case.k), torch.empty(sum(padded), case.n, device="cuda", dtype=torch.bfloat16)
        return [lambda w=w: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, w, out, idx) for w in weights]
    room = -(-max(counts) // BLOCK) * BLOCK
    x, out = tokens(case.num_groups, room, case.k), torch.empty(case.num_groups, room, case.n, device="cuda", dtype=torch.bfloat16)
    masked = torch.tensor(counts, dtype=torch.int32, device="cuda")
    return [lambda w=w: deep_gemm.m_grouped_fp8_gemm_nt_masked(x, w, out, masked, case.rows) for w in weights]
