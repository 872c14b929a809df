"""What transports share whose calls the host drives: how ranks meet before data moves, and the form in which tokens travel.

Legend: T tokens of this rank, H hidden.
"""

import torch

from megamoe.comm import Arena
from megamoe.config import X_GROUP
from megamoe.formats import QuantizedTokens
from megamoe.kernels.fold_tokens import fold_tokens
from megamoe.kernels.quantize_tokens import quantize_tokens
from megamoe.reference.fold_tokens import fold_tokens as fold_tokens_twin


def meet(arena: Arena, signal: str, phase: str) -> None:
    """Wait until every rank has come this far, so that a refused or silent rank is found by a deadline and not inside a collective.

    Args:
        signal: "inputs_ready" or "combine_ready". phase: what this rank is doing, for the message.

    Raises:
        PeerTimeoutError: a peer stayed silent past the deadline, or aborted.

    Sync: blocks the host.
    """
    for peer in range(arena.num_ranks):
        arena.post(peer, signal, arena.epoch)
    for peer in range(arena.num_ranks):
        arena.wait(signal, peer, arena.epoch, phase)
    # A late rank finds every signal there, but also that its peers have given up.
    arena.raise_if_aborted(phase)


def folded_tokens(x: torch.Tensor, x_sf: torch.Tensor | None) -> QuantizedTokens:
    """x [T, H] BF16, or codes [T, H] with x_sf [T, H/32] -> E4M3 codes with one exponent per token, the bytes that moe_stage writes.

    Raises:
        ValueError: rows of codes are not at multiples of 16 bytes. Call it before `meet`: then a refused argument costs one call only.
    """
    tokens = quantize_tokens(x, group=X_GROUP) if x_sf is None else QuantizedTokens(x, x_sf, X_GROUP)
    return fold_tokens(tokens) if x.is_cuda else fold_tokens_twin(tokens)


def load_kernels(hidden: int, device: torch.device) -> None:
    """Run the kernels of `folded_tokens` on one token, so that a call compiles nothing while its peers wait. Sync: none."""
    folded_tokens(torch.zeros(1, hidden, dtype=torch.bfloat16, device=device), None)
