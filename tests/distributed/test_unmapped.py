"""Ranks that cannot reach each other's memory: what backend "unmapped" gives, who refuses it, and the NCCL transport over it."""

import re
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from test_nccl_transport import case, exchange_tokens

from megamoe import MegaMoE, MoEConfig
from megamoe.comm import Arena, Topology, topology
from megamoe.engines.transports import NcclTransport, create_transport
from megamoe.errors import ArenaError, CollectiveMismatchError, EngineUnavailableError, PeerTimeoutError
from megamoe.testing.ranks import RankFailures, outcome

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=6, num_topk=2, max_tokens_per_rank=16)


def create(**options) -> Arena:
    return Arena.create(**{"cfg": CFG, "backend": "unmapped", "timeout_s": 10.0} | options)


def describe(rank: int, num_ranks: int):
    with create() as arena, create() as other:
        assert arena.peer_ptrs == tuple(arena.own_bytes.data_ptr() if peer == rank else 0 for peer in range(num_ranks))
        assert not any(arena.view(name).view(torch.uint8).any() for name in arena.layout.placements), "zeroed at creation"
        arena.view("num_tokens").fill_(7 + rank)
        other.barrier()
        own, others = int(arena.peer_view(rank, "num_tokens")), int(other.view("num_tokens"))
        with pytest.raises(ArenaError) as refused:
            arena.peer_view((rank + 1) % num_ranks, "x")
        arena.barrier()
        return repr(arena), own, others, str(refused.value)


def test_each_rank_has_its_own_memory(rank_pool):
    for rank, (text, own, others, refused) in enumerate(rank_pool(3).run(describe)):
        assert text == f"Arena(unmapped, rank {rank} of 3, cpu, 0.0 MiB, 192 pool rows)"
        assert (own, others) == (7 + rank, 0)
        assert refused == (f"Arena: rank of peer_view must be {rank}, this rank, got {(rank + 1) % 3}; backend 'unmapped' maps no peer's "
                           "memory: send and receive instead")


def create_with(rank: int, num_ranks: int, *options: dict) -> None:
    create(**options[rank]).close()


def test_a_mismatch_is_raised_on_every_rank(rank_pool):
    with pytest.raises(RankFailures) as caught:
        rank_pool(2).run(create_with, {}, {"cfg": replace(CFG, hidden=96)})
    for error in caught.value.errors.values():
        assert type(error) is CollectiveMismatchError
        assert str(error) == ("Arena: hidden differs between ranks: rank 0 has 64, rank 1 has 96; construct every rank with the same "
                              "arguments")


def test_one_rank_has_no_use_for_it():
    message = "Arena: backend 'unmapped' cannot run here: it needs a group of at least two ranks; use 'local'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        create()


def run_engines(rank: int, num_ranks: int):
    layers = [outcome(lambda engine=engine: MegaMoE(CFG, engine=engine, backend="unmapped")) for engine in ("auto", "reference")]
    with create() as arena:
        transports = [outcome(lambda name=name: create_transport(name, CFG, arena)) for name in ("arena", "deep_ep")]
        chosen = {create_transport(name, CFG, arena) for name in ("auto", "nccl")}
    return layers, transports, [type(transport) is NcclTransport for transport in chosen]


def test_what_needs_mapped_peers_says_so(rank_pool):
    needs = "loads and stores the memory of peers, which backend 'unmapped' does not map"
    for layers, transports, is_nccl in rank_pool(2).run(run_engines):
        assert {kind for kind, _ in layers + transports} == {EngineUnavailableError.__name__}
        assert [text for _, text in layers] == [
            f"MegaMoE: no engine can run here: reference {needs}, and unfused needs a Hopper GPU, not device cpu; use a group whose ranks "
            "are in one NVLink domain, or on the CPU on one host",
            f"MegaMoE: engine 'reference' cannot run here: it {needs}; pass engine='auto'"]
        assert [text for _, text in transports] == [f"MegaMoE: transport '{name}' cannot run here: it {needs}; unset MEGAMOE_TRANSPORT"
                                                    for name in ("arena", "deep_ep")]
        assert is_nccl == [True], "one transport, shared"


def call(arena: Arena, transport: NcclTransport, tokens, error: Exception | None = None) -> torch.Tensor | PeerTimeoutError | None:
    """A call as a layer makes it: y, the PeerTimeoutError, or None where this rank itself refuses its arguments."""
    arena.begin_call()
    try:
        if error is not None:
            raise error
        return exchange_tokens(transport, *tokens, num_experts=arena.dims.num_experts)[0]
    except PeerTimeoutError as caught:
        arena.fail_call(caught)
        return caught
    except Exception as caught:
        arena.fail_call(caught)
        return None


def run_refused_and_stalled(rank: int, num_ranks: int):
    """Good, refused by rank 1, good, too late on rank 2, reset, good."""
    this = case(None)
    tokens = this.inputs(rank)
    with Arena.create(this.cfg, backend="unmapped", timeout_s=1.0) as arena:
        transport = NcclTransport(this.cfg, arena)
        good = call(arena, transport, tokens)
        begin = time.monotonic()
        refused = call(arena, transport, tokens, ValueError("bad dtype") if rank == 1 else None)
        waited = time.monotonic() - begin
        after_refused = call(arena, transport, tokens)
        if rank == 2:
            time.sleep(1.8)
        stalled = call(arena, transport, tokens)
        unusable = outcome(arena.begin_call)
        arena.reset()
        after_reset = call(arena, transport, tokens)
        recovered = torch.equal(after_refused, good) and torch.equal(after_reset, good)
        return refused and (str(refused), refused.peer), waited, (str(stalled), stalled.peer), unusable, recovered, arena.epoch


def test_refused_and_silent_ranks_are_found_before_a_collective(rank_pool):
    for rank, (refused, waited, stalled, unusable, recovered, epoch) in enumerate(rank_pool(3).run(run_refused_and_stalled)):
        assert refused == (None if rank == 1 else (
            f"rank {rank}: rank 1 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 1: this call "
            "is lost, the next one works", 1))
        assert waited < 0.9, "an abort does not wait for the deadline"
        if rank != 2:
            assert stalled[1] == 2 and stalled[0].startswith(f"rank {rank}: ") and "rank 2" in stalled[0] and "silent" in stalled[0]
        assert unusable[0] == "RuntimeError" and "call reset() on every rank" in unusable[1]
        assert recovered and epoch == 1


def find_domain(rank: int, num_ranks: int, hosts: tuple[str, ...], unreachable: tuple[tuple[int, int], ...]):
    """The topology of ranks on `hosts`, where rank a of each pair (a, b) in `unreachable` cannot reach b."""
    with (patch.object(topology.socket, "gethostname", lambda: hosts[rank]), patch.object(topology, "_uuid", lambda device: str(rank)),
          patch.object(topology, "_can_access", lambda device, uuid: (rank, int(uuid)) not in unreachable)):
        found = Topology.from_group()
    return found.nvlink_ranks, found.is_one_domain


@pytest.mark.parametrize("hosts, unreachable, expected", [
    ("aaa", (), [((0, 1, 2), True)] * 3),
    ("aab", (), [((0, 1), False), ((0, 1), False), ((2,), False)]),
    ("aaa", ((1, 2), (2, 1)), [((0,), False), ((1,), False), ((2,), False)]),
    ("aaa", ((1, 2),), [((0, 2), False), ((1,), False), ((0, 2), False)])])
def test_ranks_agree_on_whether_they_are_one_domain(rank_pool, hosts, unreachable, expected):
    assert rank_pool(3).run(find_domain, tuple(hosts), unreachable) == expected
