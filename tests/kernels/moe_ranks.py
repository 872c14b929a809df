"""One GPU plays W ranks of a MoE call, with a stand-in for the experts, and what plain torch makes of the same inputs.

Legend: W ranks, T tokens of a rank, K top-k slots, E experts, H hidden.
"""

from dataclasses import dataclass

import torch

from megamoe.comm.device_calls import DeviceCalls
from megamoe.comm.protocol import SIGNALS, ArenaDims, pack
from megamoe.formats import quantize_tokens, ue8m0
from megamoe.kernels.moe_dispatch import ArenaDispatch
from megamoe.reference.fold_tokens import fold_tokens as fold_twin

DIMS = ArenaDims(num_ranks=3, max_tokens=70, num_topk=3, num_experts=12, hidden=96, intermediate=32, precision="fp8xfp4", pool_rows=1024)


@dataclass
class Inputs:
    x: torch.Tensor  # [T, H] bfloat16
    topk_idx: torch.Tensor  # [T, K] int64
    topk_weights: torch.Tensor  # [T, K] float32


class VirtualRanks:
    """W arenas on this GPU, poisoned but for their signals, and what each rank keeps to itself."""

    def __init__(self, dims: ArenaDims, timeout_s: float = 20.0, **options):
        self.dims, self.layout, device = dims, pack(dims), torch.device("cuda", torch.cuda.current_device())
        self.arenas = [torch.full((self.layout.num_bytes,), 0xFF, dtype=torch.uint8, device=device) for _ in range(dims.num_ranks)]
        self.zero_signals()
        ptrs = [arena.data_ptr() for arena in self.arenas]
        self.calls = [DeviceCalls(device, rank, dims.num_ranks, timeout_s) for rank in range(dims.num_ranks)]
        self.ranks = [ArenaDispatch(self.layout, rank, ptrs, self.arenas[rank], device, self.calls[rank], **options)
                      for rank in range(dims.num_ranks)]
        self.loads = torch.zeros(dims.num_ranks, dims.num_experts // dims.num_ranks, dtype=torch.int64, device=device)

    def view(self, rank: int, name: str) -> torch.Tensor:
        return self.layout.view(name, self.arenas[rank])

    def zero_signals(self) -> None:
        for rank in range(self.dims.num_ranks):
            for signal in SIGNALS:
                self.view(rank, signal).zero_()

    def stage(self, rank: int, inputs: Inputs) -> None:
        self.ranks[rank].stage(inputs.x.cuda(), None, inputs.topk_idx.cuda(), inputs.topk_weights.cuda())

    def run_experts(self, rank: int) -> list[tuple[list[int], list[list]]]:
        """Route, then for each pass pull and push the stand-in expert's rows: value of the row * weight * (global expert + 1).

        Returns (offsets, rows) per pass, a row being [codes, sf, weight, (src, token, slot)].
        """
        dispatch, passes = self.ranks[rank], []
        dispatch.route(self.loads[rank])
        for pass_idx in range(dispatch.num_passes):
            rows = dispatch.pull(pass_idx)
            offsets, count = rows.offsets.tolist(), int(rows.bounds[0, 1])
            assert rows.bounds.tolist() == [[0, offsets[-1]]] and offsets[0] == 0 and sorted(offsets) == offsets
            places = [self.place_of(address) for address in rows.row_dst[:count].tolist()]
            first_expert = rank * (len(offsets) - 1)
            expert = torch.bucketize(torch.arange(count), torch.tensor(offsets[1:]), right=True) + first_expert
            codes, sf, weight = (t[:count].cpu() for t in (rows.codes.view(torch.uint8), rows.sf, rows.row_weight))
            for row, (src, token, slot) in enumerate(places):
                value = expert_row(codes[row], sf[row], weight[row], int(expert[row]))
                self.view(src, "partials")[token, slot] = value.cuda()
            passes.append((offsets, [list(row) for row in zip(codes, sf.tolist(), weight.tolist(), places)]))
        return passes

    def place_of(self, address: int) -> tuple[int, int, int]:
        """(rank, token, slot) of an address in somebody's partials."""
        row_bytes = 2 * self.dims.hidden
        for rank in range(self.dims.num_ranks):
            partials = self.view(rank, "partials")
            offset = address - partials.data_ptr()
            if 0 <= offset < partials.nbytes:
                assert offset % row_bytes == 0
                return rank, *divmod(offset // row_bytes, self.dims.num_topk)
        raise AssertionError(f"row_dst {address:#x} is in no rank's partials")

    def combine(self, num_tokens: list[int]) -> list[torch.Tensor]:
        """Every rank on its own stream, as each waits for the others."""
        outputs = [torch.full((t, self.dims.hidden), torch.nan, dtype=torch.bfloat16, device="cuda") for t in num_tokens]
        torch.cuda.synchronize()
        for dispatch, y in zip(self.ranks, outputs):
            with torch.cuda.stream(torch.cuda.Stream()):
                dispatch.combine(y)
        torch.cuda.synchronize()
        return [y.cpu() for y in outputs]

    def call(self, inputs: list[Inputs]) -> tuple[list, list[torch.Tensor]]:
        for rank, given in enumerate(inputs):
            self.stage(rank, given)
        passes = [self.run_experts(rank) for rank in range(self.dims.num_ranks)]
        return passes, self.combine([len(given.x) for given in inputs])


def expert_row(codes: torch.Tensor, sf: torch.Tensor, weight: torch.Tensor, expert: int) -> torch.Tensor:
    """The stand-in expert: [H] codes bytes -> [H] bfloat16."""
    return (codes.view(torch.float8_e4m3fn).float() * ue8m0.decode(sf) * weight * (expert + 1)).bfloat16()


def make_inputs(dims: ArenaDims, num_tokens: int, seed: int) -> Inputs:
    """Channels of widely different size, indices over all experts, some -1, experts repeated within tokens."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-12, 4, (num_tokens, dims.hidden // 32), generator=generator).float()).repeat_interleave(32, dim=1)
    x = (torch.randn(num_tokens, dims.hidden, generator=generator) * spread).bfloat16()
    topk_idx = torch.randint(-1, dims.num_experts, (num_tokens, dims.num_topk), generator=generator)
    return Inputs(x, topk_idx, torch.rand(num_tokens, dims.num_topk, generator=generator))


def expected_rows(dims: ArenaDims, inputs: list[Inputs], rank: int) -> list[tuple[int, int, int, int]]:
    """(expert, src, token, slot) of a rank's rows, in order: of each expert first those of the rank itself, then of the rank after it."""
    local = dims.num_experts // dims.num_ranks
    rows = ((expert, src, token, slot)
            for src, given in enumerate(inputs) for token, experts in enumerate(given.topk_idx.tolist())
            for slot, expert in enumerate(experts) if expert >= 0 and expert // local == rank and expert < dims.num_experts)
    return sorted(rows, key=lambda row: (row[0], (row[1] - rank) % dims.num_ranks, *row[2:]))


def canonical(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 bytes in which a NaN has one sign."""
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


def assert_call(dims: ArenaDims, inputs: list[Inputs], passes: list, outputs: list[torch.Tensor]) -> None:
    """Every row's bytes and place, the offsets of every pass, and y."""
    tokens = [fold_twin(quantize_tokens(given.x, 32)) for given in inputs]
    for rank, of_rank in enumerate(passes):
        expected = expected_rows(dims, inputs, rank)
        first_expert = rank * (dims.num_experts // dims.num_ranks)
        for pass_idx, (offsets, rows) in enumerate(of_rank):
            of_pass = expected[pass_idx * dims.pool_rows:(pass_idx + 1) * dims.pool_rows]
            begins = [sum(row[0] < first_expert + i for row in of_pass) for i in range(len(offsets))]
            assert offsets == begins
            assert [row[3] for row in rows] == [row[1:] for row in of_pass]
            for codes, sf, weight, (src, token, slot) in rows:
                assert torch.equal(canonical(codes), canonical(tokens[src].codes[token].view(torch.uint8)))
                assert (sf, weight) == (int(tokens[src].sf[token, 0]), float(inputs[src].topk_weights[token, slot]))
        assert sum(len(rows) for _, rows in of_rank) == len(expected)
    for given, folded, y in zip(inputs, tokens, outputs):
        assert torch.allclose(y, expected_output(dims, given, folded), rtol=0, atol=0, equal_nan=True)


def expected_output(dims: ArenaDims, given: Inputs, folded) -> torch.Tensor:
    y = torch.zeros(given.x.shape, dtype=torch.float32)
    for token, experts in enumerate(given.topk_idx.tolist()):
        for slot, expert in enumerate(experts):
            if 0 <= expert < dims.num_experts:
                codes = folded.codes[token].view(torch.uint8)
                y[token] += expert_row(codes, folded.sf[token], given.topk_weights[token, slot], expert).float()
    return y.bfloat16()


def run_and_check(ranks: VirtualRanks, inputs: list[Inputs]) -> None:
    loads = ranks.loads.cpu().clone()
    assert_call(ranks.dims, inputs, *ranks.call(inputs))
    local = ranks.dims.num_experts // ranks.dims.num_ranks
    for rank in range(ranks.dims.num_ranks):
        counts = torch.bincount(torch.tensor([row[0] - rank * local for row in expected_rows(ranks.dims, inputs, rank)], dtype=torch.int64),
                                minlength=local)
        assert torch.equal(ranks.loads[rank].cpu() - loads[rank], counts)
    assert all(calls.failure() is None for calls in ranks.calls)
