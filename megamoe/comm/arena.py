"""Arena: the symmetric memory of one expert-parallel group, with typed views, signals that have deadlines, and collective life cycle.

Where a region lies is the protocol's business, where the bytes come from the backend's.
"""

import torch
import torch.distributed as dist

from megamoe.comm import backends
from megamoe.comm.agreement import agree, rank_and_size
from megamoe.comm.backends import Backend
from megamoe.comm.budget import plan_dims
from megamoe.comm.calls import Calls
from megamoe.comm.protocol import SIGNALS, ArenaDims, Layout, pack
from megamoe.comm.signals import DeviceWords, HostWords
from megamoe.comm.topology import Topology
from megamoe.config import MoEConfig
from megamoe.errors import EngineUnavailableError, check

# A peer may have to run into a deadline of its own before it learns that a reset is due.
_RESET_DEADLINES = 2
# Field of MoEConfig -> field of ArenaDims: what layers that share an arena must have in common.
_SHARED_DIMS = {"hidden": "hidden", "intermediate": "intermediate", "num_experts": "num_experts", "num_topk": "num_topk",
                "max_tokens_per_rank": "max_tokens", "precision": "precision"}


class Arena(Calls):
    """One rank's end of the arena. Create it with `Arena.create`; share it between layers of the same shape.

    Beside what `Calls` has: `peer_ptrs` are the addresses of every rank's memory as this rank loads and stores it; `num_calls` [] int64
    counts calls on the device, since an operator that mutates it is neither reordered nor dropped by a compiler.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, layout: Layout, memory: Backend, device: torch.device,
                 timeout_s: float):
        words = HostWords if device.type == "cpu" else DeviceWords
        arenas = [memory.peer(peer) for peer in range(topology.num_ranks)]
        super().__init__(words(layout, arenas, topology.rank), topology.rank, topology.num_ranks, timeout_s)
        self.topology, self.group, self.layout, self.device = topology, group, layout, device
        self.backend, self.peer_ptrs, self._memory = memory.name, memory.peer_ptrs, memory
        self.num_calls = torch.zeros((), dtype=torch.int64, device=device)

    @classmethod
    def create(cls, cfg: MoEConfig, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu", backend: str = "auto",
               arena_bytes: int | None = None, timeout_s: float = 120.0) -> "Arena":
        """Allocate and map the arena of a group.

        Args:
            cfg: the layers that will use it.
            group: the EP group; None is the default group, or a world of one where torch.distributed is not initialised.
            device: where the memory lives.
            backend: "auto", "local" (one rank), "shm" (CPU), "torch" or "nvshmem" (CUDA).
            arena_bytes: most bytes this rank may spend; a smaller pool makes skewed routing slower, never wrong. None: a default pool.
            timeout_s: deadline of every wait, in seconds.
        Raises:
            CollectiveMismatchError: the ranks passed different arguments.
            ArenaBudgetError: arena_bytes cannot hold the config.
            ArenaError: the memory could not be allocated.
            EngineUnavailableError: the backend cannot run here.
            All of them on every rank, with the text of each rank that failed.
        Sync: collective over the group.
        """
        layout, error, fields = None, None, {}
        try:
            device = _resolve_device(device)
            check(timeout_s > 0, "Arena", "timeout_s", "positive", timeout_s, "pass seconds")
            layout = pack(plan_dims(cfg, rank_and_size(group)[1], arena_bytes))
            fields = {**cfg.as_dict(), "device": device.type, "backend": backend, "arena_bytes": arena_bytes, "timeout_s": timeout_s,
                      **{f"region {name}": str(place) for name, place in layout.placements.items()}, "layout hash": layout.hash}
        except (ValueError, RuntimeError) as caught:
            error = caught
        agree(group, "Arena", fields, error)

        topology = Topology.from_group(group, device)
        try:
            backend = backends.choose(backend, topology, device)
        except EngineUnavailableError as caught:
            error = caught
        agree(group, "Arena", {"backend": backend}, error)
        memory = backends.create(backend, topology, group, layout.num_bytes, device)
        return cls(topology, group, layout, memory, device, timeout_s)

    @property
    def dims(self) -> ArenaDims:
        return self.layout.dims

    @property
    def num_bytes(self) -> int:
        """Bytes this rank spends on the arena."""
        return self.layout.num_bytes

    def mismatch(self, cfg: MoEConfig) -> ValueError | None:
        """Why a layer of `cfg` cannot share this arena, or None. Returned, not raised: every rank must hear of it."""
        for field, dim in _SHARED_DIMS.items():
            got, expected = getattr(cfg, field), getattr(self.dims, dim)
            if got != expected:
                return ValueError(f"Arena: {field} must be {expected}, as the arena has it, got {got}; share arenas between equal shapes")
        return None

    def view(self, name: str) -> torch.Tensor:
        """This rank's region `name` as a tensor of the protocol's shape and dtype."""
        return self.peer_view(self.rank, name)

    def peer_view(self, rank: int, name: str) -> torch.Tensor:
        """Region `name` in the memory of `rank`, which may be our own. Raises ArenaError once the arena is closed."""
        self._check_open()
        return self.layout.view(name, self._memory.peer(rank))

    def reset(self) -> None:
        """Make the arena usable again after a PeerTimeoutError or an abort: zero all signals and the epoch.

        Raises:
            PeerTimeoutError: a peer did not join within 2 * timeout_s. Calling reset again resumes it.
        Sync: collective, blocks the host.
        """
        # INVARIANT: an odd step count means that this rank has zeroed its words but not yet seen that all others have.
        if self._num_reset_steps % 2 == 0:
            self._meet_for_reset()  # every rank has left its call, so no signal of it is still under way
            for signal in SIGNALS:
                if signal != "reset":
                    self.view(signal).zero_()
            self._start_over()
            self._num_reset_steps += 1
        self._meet_for_reset()  # every rank has zeroed its words, so new ones are not lost
        self._num_reset_steps += 1
        self._failure = None

    def close(self) -> None:
        """Give the memory back. Idempotent. Sync: collective; views must not be used afterwards."""
        if self._words is not None:
            self._words = None
            self._memory.close()

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._words is None else f"{self.num_bytes / 2**20:.1f} MiB, {self.dims.pool_rows} pool rows"
        return f"Arena({self.backend}, rank {self.rank} of {self.num_ranks}, {self.device}, {state})"

    def _meet_for_reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._meet("reset", self._num_reset_steps + 1, _RESET_DEADLINES * self.timeout_s)


def _resolve_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
