"""Arena: the symmetric memory of one expert-parallel group, with typed views, signals that have deadlines, and collective life cycle.

Where a region lies is the protocol's business, where the bytes come from the backend's. The calls of an arena are driven by the host
(`Calls`) or by kernels (`DeviceCalls`): the first layer decides.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megamoe.comm import backends
from megamoe.comm.agreement import agree, rank_and_size
from megamoe.comm.backends import Backend
from megamoe.comm.budget import plan_dims
from megamoe.comm.calls import Calls
from megamoe.comm.device_calls import DeviceCalls
from megamoe.comm.protocol import ArenaDims, Layout, pack
from megamoe.comm.topology import Topology
from megamoe.config import MoEConfig
from megamoe.errors import ArenaError, EngineUnavailableError, PeerTimeoutError, check

T = TypeVar("T")

# A peer may have to run into a deadline of its own before it learns that a reset is due.
_RESET_DEADLINES = 2
# Field of MoEConfig -> field of ArenaDims: what layers that share an arena must have in common.
_SHARED_DIMS = {"hidden": "hidden", "intermediate": "intermediate", "num_experts": "num_experts", "num_topk": "num_topk",
                "max_tokens_per_rank": "max_tokens", "precision": "precision"}


class Arena(Calls):
    """One rank's end of the arena. Create it with `Arena.create`; share it between layers of the same shape.

    Beside what `Calls` has: `peer_ptrs` are the addresses of every rank's memory as this rank loads and stores it, 0 for a peer whose
    memory is not mapped; `is_mapped` says whether all are; `device_calls` is what kernels drive the calls by, None where the host does;
    `num_calls` [] int64 on the CPU counts calls, since an operator that mutates it is neither reordered nor dropped by a compiler.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, layout: Layout, memory: Backend, device: torch.device,
                 timeout_s: float):
        super().__init__(backends.signal_words(memory, topology, layout, timeout_s), topology.rank, topology.num_ranks, timeout_s)
        self.topology, self.group, self.layout, self.device = topology, group, layout, device
        self.backend, self.peer_ptrs, self._memory = memory.name, memory.peer_ptrs, memory
        self.is_mapped = memory.words is None
        self.num_calls = torch.zeros((), dtype=torch.int64)
        self.device_calls: DeviceCalls | None = None
        self._reported: PeerTimeoutError | None = None  # by the device, not raised yet
        self._driver: str | None = None
        self._shared: dict[str, object] = {}

    @classmethod
    def create(cls, cfg: MoEConfig, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu", backend: str = "auto",
               arena_bytes: int | None = None, timeout_s: float = 120.0) -> "Arena":
        """Allocate and map the arena of a group.

        Args:
            cfg: the layers that will use it.
            group: the EP group; None is the default group, or a world of one where torch.distributed is not initialised.
            device: where the memory lives.
            backend: "auto", "local" (one rank), "shm" (CPU), "torch" or "nvshmem" (CUDA), or "unmapped" for ranks that cannot reach each
                other's memory, which "auto" takes for GPUs of several NVLink domains.
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
        """Region `name` in the memory of `rank`, which may be our own. Raises ArenaError where none is mapped and once closed."""
        self._check_open()
        if rank != self.rank and not self.is_mapped:
            raise ArenaError(f"Arena: rank of peer_view must be {self.rank}, this rank, got {rank}; backend {self.backend!r} maps no peer's "
                             "memory: send and receive instead")
        return self.layout.view(name, self._memory.peer(rank))

    @property
    def own_bytes(self) -> torch.Tensor:
        """[num_bytes] uint8: this rank's memory. Raises ArenaError once the arena is closed."""
        self._check_open()
        return self._memory.peer(self.rank)

    def claim(self, driver: str) -> None:
        """Say who drives the calls: "host" or "device". Raises ValueError if a layer that shares this arena has said otherwise."""
        check(self._driver in (None, driver), "Arena", "the driver of its calls", f"the {self._driver}, as its first layer has it",
              f"the {driver}", "create the layer with an arena of its own")
        self._driver = driver

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What all layers on this arena use in turn, made by the first one; lives until the arena is closed."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def drive_by_device(self) -> DeviceCalls:
        """Let kernels drive the calls from now on. Raises ValueError if a layer that shares this arena lets the host do it."""
        self.claim("device")
        if self.device_calls is None:
            self.device_calls = DeviceCalls(self.device, self.rank, self.num_ranks, self.timeout_s)
        return self.device_calls

    def begin_call(self) -> None:
        """Start the next call on this rank.

        Raises:
            PeerTimeoutError: the device has reported that the arena needs a reset.
            RuntimeError: the last call left it so, which has been raised before.
        """
        if self.device_calls is not None and self._failure is None:
            self._read_report()
            if self._failure is not None:
                raise self.take_failure()
        super().begin_call()

    def note_published(self) -> None:
        """Peers may read this rank's inputs of the current call from now on. For calls that the device drives."""
        self._published_epoch = self.epoch

    def fail_call(self, error: BaseException) -> None:
        if self.device_calls is not None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return  # nothing has run, so no peer waits
            # Replays of a graph raise the epoch without the host.
            has_published = self._published_epoch == self.epoch
            self.epoch = self.device_calls.epoch()
            self._published_epoch = self.epoch
            if not has_published:
                self.device_calls.advance()
                self.epoch += 1
        super().fail_call(error)

    def take_failure(self) -> PeerTimeoutError | None:
        """What kernels have reported about a peer, None if there is nothing. A refused call is told once, anything else until `reset`.

        Sync: none, so a call that still runs has reported nothing.
        """
        self._read_report()
        error, self._reported = self._reported, None
        return error

    def _read_report(self) -> None:
        failure = self.device_calls.failure() if self._reported is None else None
        if failure is not None:
            self._reported = failure.error(self.rank, self.timeout_s)
            if not failure.is_refusal:
                self._failure = str(self._reported)

    def reset(self) -> None:
        """Make the arena usable again after a PeerTimeoutError or an abort: zero all signals and the epoch.

        Raises:
            PeerTimeoutError: a peer did not join within 2 * timeout_s. Calling reset again resumes it.
        Sync: collective, blocks the host.
        """
        # INVARIANT: an odd step count means that this rank has zeroed its words but not yet seen that all others have.
        if self._num_reset_steps % 2 == 0:
            self._meet_for_reset()  # every rank has left its call, so no signal of it is still under way
            self._words.clear()
            self._start_over()
            self._reported = None
            if self.device_calls is not None:
                self.device_calls.start_over()
                self._synchronize()  # before a peer may post the first word of the next call
            self._num_reset_steps += 1
        self._meet_for_reset()  # every rank has zeroed its words, so new ones are not lost
        self._num_reset_steps += 1
        self._failure = None

    def close(self) -> None:
        """Give the memory back. Idempotent. Sync: collective; views must not be used afterwards."""
        if self._words is not None:
            self._words = None
            self._shared.clear()
            if self.device_calls is not None:
                self._synchronize()  # calls that are still under way use the memory
            self._memory.close()

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._words is None else f"{self.num_bytes / 2**20:.1f} MiB, {self.dims.pool_rows} pool rows"
        return f"Arena({self.backend}, rank {self.rank} of {self.num_ranks}, {self.device}, {state})"

    def _meet_for_reset(self) -> None:
        self._synchronize()
        self._meet("reset", self._num_reset_steps + 1, _RESET_DEADLINES * self.timeout_s)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _resolve_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
