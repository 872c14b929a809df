"""The kernels that move a MoE call's tokens between ranks: text, threads and parameters of csrc/include/megamoe/kernels/moe_*.cuh."""

import ctypes
from collections.abc import Sequence

from megamoe.comm.device_calls import CallStateParams
from megamoe.comm.protocol import ArenaDims, emit_struct, pack
from megamoe.kernels import codegen
from megamoe.kernels.launch import params_struct
from megamoe.kernels.mega_moe_config import has_thread_order

ROUTING_OPS = ("moe_stage", "moe_route", "moe_assign")
OPS = (*ROUTING_OPS, "moe_pull", "moe_combine")
CHUNK_ENTRIES = 2048  # (token, slot) entries that one block routes
MAX_RANKS = 72  # Symm::kMaxRanks
_THREADS = {"moe_route": 1024, "moe_assign": 512, "moe_pull": 256, "moe_combine": 256}
_BLOCKS_PER_SM = {"moe_pull": 3, "moe_combine": 4}  # of the grid; registers let two blocks of moe_combine run at once
# moe_stage has a block per token. Its threads hold this many 16-byte vectors of BF16 each, and at most 72 registers.
_STAGE_VECTORS, _STAGE_THREADS_PER_SM, _MAX_BLOCKS_PER_SM = 4, 896, 32

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p


class Symm(ctypes.Structure):
    """csrc/include/megamoe/comm/symm.cuh: the arenas of all ranks as one of them sees them."""

    _fields_ = [("base", ctypes.c_uint64), ("offsets", ctypes.c_int64 * MAX_RANKS), ("rank", _u32), ("num_ranks", _u32)]

    @classmethod
    def of(cls, rank: int, peer_ptrs: Sequence[int]) -> "Symm":
        """`peer_ptrs`: address of every rank's arena as `rank` loads and stores it, its own included."""
        symm = cls(base=peer_ptrs[rank], rank=rank, num_ranks=len(peer_ptrs))
        symm.offsets[: len(peer_ptrs)] = [pointer - peer_ptrs[rank] for pointer in peer_ptrs]
        return symm


def _params(name: str, *members: str, **sizes: type) -> type:
    """A parameter block: Symm and CallStateParams where named, pointers, then 32-bit sizes."""
    kinds = {"symm": Symm, "calls": CallStateParams}
    return params_struct(name, [*((member, kinds.get(member, _pointer)) for member in members), *sizes.items()])


PARAMS = {
    "moe_stage": _params("MoeStageParams", "symm", "calls", "x", "x_sf", "topk_idx", "topk_weights", "num_arrived",
                         num_tokens=_u32, is_quantized=_u32),
    "moe_route": _params("MoeRouteParams", "symm", "calls", "entry_expert", "chunk_rows", "offsets", "bounds", "expert_load",
                         "num_arrived", "ahead", ahead_bytes=_u32),
    "moe_assign": _params("MoeAssignParams", "calls", "entry_expert", "chunk_rows", "row_entry", rank=_u32),
    "moe_pull": _params("MoePullParams", "symm", "row_entry", "bounds", "codes", "sf", "row_weight", "row_dst"),
    "moe_combine": _params("MoeCombineParams", "symm", "calls", "y", num_tokens=_u32),
}


def threads(op: str, dims: ArenaDims) -> int:
    """Threads of a block of `op`."""
    if op != "moe_stage":
        return _THREADS[op]
    num_vectors = dims.hidden // 8
    return min(1024, 32 * -(-num_vectors // (32 * _STAGE_VECTORS)))


def blocks_per_sm(op: str, dims: ArenaDims) -> int:
    """Blocks per SM that moe_stage, moe_pull or moe_combine is launched with at most."""
    if op != "moe_stage":
        return _BLOCKS_PER_SM[op]
    return max(1, min(_MAX_BLOCKS_PER_SM, _STAGE_THREADS_PER_SM // threads(op, dims)))


def num_entries(dims: ArenaDims) -> int:
    """(token, slot) entries of all ranks at capacity, each of which may be a row here: a token may name an expert twice."""
    return dims.num_ranks * dims.max_tokens * dims.num_topk


def num_passes(dims: ArenaDims) -> int:
    """Times the pool must be filled in the worst case."""
    return -(-num_entries(dims) // dims.pool_rows)


def num_chunks(dims: ArenaDims) -> int:
    """Chunks of one rank's entries."""
    return -(-dims.max_tokens * dims.num_topk // CHUNK_ENTRIES)


def source(op: str, dims: ArenaDims, is_one_pass: bool = False) -> str:
    """One translation unit with the kernel `op`, one of OPS, for arenas of `dims`; `is_one_pass`: for mega_moe, any number of rows in one pass."""
    passes = (1, num_entries(dims)) if is_one_pass else (num_passes(dims), dims.pool_rows)
    config = {"num_ranks": dims.num_ranks, "max_tokens": dims.max_tokens, "num_topk": dims.num_topk, "num_experts": dims.num_experts,
              "num_local_experts": dims.num_experts // dims.num_ranks, "hidden": dims.hidden, "num_passes": passes[0],
              "pool_rows": passes[1], "chunk_entries": CHUNK_ENTRIES, "num_chunks": num_chunks(dims),
              "stage_threads": threads("moe_stage", dims),
              "thread_order": is_one_pass and has_thread_order(dims.hidden, dims.intermediate)}
    params, bounds = PARAMS[op].__name__, str(threads(op, dims))
    if op == "moe_stage":
        bounds += f", {blocks_per_sm(op, dims)}"
    arguments = "Config" if op == "moe_assign" else "Layout, Config"
    return "\n".join([
        f"#include <megamoe/kernels/{op}.cuh>",
        emit_struct(pack(dims)),
        codegen.emit_struct("Config", config),
        f'extern "C" __global__ void __launch_bounds__({bounds}) {op}(const __grid_constant__ megamoe::{params} params) {{',
        f"  megamoe::{op}<{arguments}>(params);",
        "}",
        "",
    ])
