"""Arenas on the NVSHMEM symmetric heap through nvshmem4py: opt-in. Peers' memory is used through plain pointers only.

NVSHMEM is initialised once per process, for the ranks of the first arena's group.
"""

import atexit
import importlib.util
import os

import torch
import torch.distributed as dist

from megamoe.comm.agreement import agree, gather
from megamoe.comm.topology import Topology
from megamoe.errors import EngineUnavailableError

# A single host needs neither a network card nor switch multicast, and bootstraps over loopback.
_SINGLE_HOST_DEFAULTS = {"NVSHMEM_REMOTE_TRANSPORT": "none", "NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
                         "NVSHMEM_BOOTSTRAP_UID_SOCK_FAMILY": "AF_INET"}
_world: tuple[int, ...] | None = None  # global ranks NVSHMEM was initialised for
_num_open = 0


def why_not(topology: Topology, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it holds GPU memory and the device is {device}; use 'shm'"
    if not torch.cuda.is_available():
        return "no CUDA device was found; use device='cpu'"
    if not topology.is_one_domain:
        return f"only the GPUs of ranks {topology.nvlink_ranks} are in load/store reach of rank {topology.rank}; use 'unmapped'"
    if importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed; pip install 'megamoe[nvshmem]'"
    return None


def create(topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> "NvshmemBackend":
    _initialise(topology, group, device)
    return NvshmemBackend(topology, group, num_bytes, device)


def _initialise(topology: Topology, group: dist.ProcessGroup | None, device: torch.device) -> None:
    global _world
    ranks = tuple(gather(group, dist.get_rank() if dist.is_initialized() else 0))
    error = None
    if _world not in (None, ranks):
        error = EngineUnavailableError(f"Arena: backend 'nvshmem' serves one group per process and was started for ranks {_world}, "
                                       f"got {ranks}; use 'torch' for further groups")
    agree(group, "Arena", {"nvshmem world": _world}, error)
    if _world is not None:
        return
    for name, value in _SINGLE_HOST_DEFAULTS.items():
        os.environ.setdefault(name, value)
    uid = None
    try:
        import nvshmem.core
        from cuda.core import Device

        uid = nvshmem.core.get_unique_id(empty=topology.rank != 0)
    except Exception as caught:  # an import or a library that fails in any way means the same to the other ranks
        error = EngineUnavailableError(f"Arena: backend 'nvshmem' cannot run here: {caught}")
    agree(group, "Arena", {}, error)
    uid = gather(group, uid)[0]
    torch.cuda.set_device(device)
    cuda_device = Device(device.index)
    cuda_device.set_current()
    nvshmem.core.init(device=cuda_device, uid=uid, rank=topology.rank, nranks=topology.num_ranks, initializer_method="uid")
    _world = ranks
    atexit.register(_finalize)


def _finalize() -> None:
    # NOTE: finalize waits for every rank. With an arena still open this exit is not an orderly one, so peers may never come.
    if _num_open == 0:
        import nvshmem.core

        nvshmem.core.finalize()


class NvshmemBackend:
    name = "nvshmem"
    words = None

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device):
        global _num_open
        import nvshmem.core

        self._group, self._device = group, device
        # NOTE: except_on_del only silences the interpreter's exit; the memory is freed by close.
        self.local = nvshmem.core.tensor((num_bytes,), dtype=torch.uint8, except_on_del=False).zero_()
        # NOTE: asking for our own tensor again would break nvshmem4py's reference counts.
        self._peers = [self.local if peer == topology.rank else nvshmem.core.get_peer_tensor(self.local, peer)
                       for peer in range(topology.num_ranks)]
        self.peer_ptrs = tuple(peer.data_ptr() for peer in self._peers)
        _num_open += 1
        self.barrier()

    def peer(self, rank: int) -> torch.Tensor:
        return self._peers[rank]

    def barrier(self) -> None:
        torch.cuda.synchronize(self._device)
        agree(self._group, "Arena", {})

    def close(self) -> None:
        """Free the memory on all ranks; no view of it may be used afterwards."""
        global _num_open
        import nvshmem.core

        self.barrier()
        self._peers = []
        nvshmem.core.free_tensor(self.local)
        self.local = torch.empty(0, dtype=torch.uint8)
        _num_open -= 1
