"""What kernels report about values that only the device has seen: a flag per kind in host memory, the first offender on the device.

csrc/include/megamoe/device_errors.cuh writes them. Ops call `raise_pending` before they launch, so an error surfaces at the next op without
a synchronisation; `check` waits for the device and raises what there is.
"""

import ctypes
import functools

import torch

from megamoe.kernels.launch import params_struct

OPS = ("grouped_gemm", "grouped_gemm_swiglu", "permute_tokens", "unpermute_tokens")
# In the order of enum GroupingError: op and the offender's index and value -> the message.
KINDS = (
    "{op}: expert_idx[{index}] must be in [-1, G), got {value}; -1 marks a padding row",
    "{op}: expert_idx[{index}] must be next to the other rows of its group, got group {value} again; sort the rows by group",
    "{op}: offsets[{index}] must be non-decreasing from 0 to at most M, got {value}; pass the cumulative row counts",
    "{op}: num_rows[{index}] must be in [0, Mmax], got {value}; a group has at most Mmax rows",
    "{op}: index[{index}] must be in [-1, M), got {value}; -1 gives a row of zeros",
    "{op}: index.flatten()[{index}] must be in [-1, R), got {value}; -1 skips a slot",
)

DeviceErrors = params_struct("DeviceErrors", [("first", ctypes.c_void_p), ("flags", ctypes.c_void_p)])


class _Reports:
    """The slots of one device: first[op * len(KINDS) + kind]."""

    def __init__(self, device: int):
        num_slots = len(OPS) * len(KINDS)
        # Pinned: its address is also the device's. The flags say that `first` is worth a synchronising read.
        self.flags = torch.zeros(num_slots, dtype=torch.int32, pin_memory=True)
        self.first = torch.full((num_slots,), -1, dtype=torch.int64, device=f"cuda:{device}")
        self.host_flags = (ctypes.c_uint32 * num_slots).from_address(self.flags.data_ptr())
        self.no_flags = bytes(ctypes.sizeof(self.host_flags))

    def take(self, slot: int) -> tuple[int, int] | None:
        """(index, value) of the first offender of a slot, which is empty afterwards; None if there is none. Sync: reads the device."""
        self.host_flags[slot] = 0
        record = self.first[slot].item()
        self.first[slot] = -1
        return None if record == -1 else (record >> 32, ctypes.c_int32(record & 0xFFFFFFFF).value)


@functools.cache
def _reports(device: int) -> _Reports:
    return _Reports(device)


def target(op: str, device: int) -> DeviceErrors:
    """Where kernels of `op` on `device` report; the device adds the kind. Not to be called for the first time inside a graph capture."""
    reports, base = _reports(device), OPS.index(op) * len(KINDS)
    return DeviceErrors(reports.first.data_ptr() + 8 * base, reports.flags.data_ptr() + 4 * base)


def raise_pending(device: int) -> None:
    """Raise ValueError for what kernels of `device` have reported so far, one error per call.

    Sync: none unless there is an error. Inside a graph capture errors stay pending.
    """
    reports = _reports(device)
    if bytes(reports.host_flags) == reports.no_flags or torch.cuda.is_current_stream_capturing():
        return
    for slot, flag in enumerate(reports.host_flags):
        offender = reports.take(slot) if flag else None
        if offender is not None:
            op, kind = divmod(slot, len(KINDS))
            raise ValueError(KINDS[kind].format(op=OPS[op], index=offender[0], value=offender[1]))


def check(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device and raise what its kernels have found wrong with their inputs, e.g. an expert index out of range.

    Such an error also surfaces at the next op. Rows out of range are treated as padding: nothing outside the tensors is touched.

    Args:
        device: a CUDA device; None: the current one. Without a GPU there is nothing to check.

    Raises:
        ValueError: names the op, the first offending index and its value, clamped to 32 bits. One error per call.

    Sync: waits for the device. Not to be called inside a graph capture; call it after replays.
    """
    if not torch.cuda.is_available():
        return
    device = torch.device("cuda" if device is None else device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.synchronize(index)
        raise_pending(index)
