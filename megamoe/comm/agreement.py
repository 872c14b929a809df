"""Collective argument checks: every rank tells what it was given and whether it failed, and all ranks raise together or none does."""

from collections.abc import Mapping

import torch.distributed as dist

from megamoe.errors import ArenaBudgetError, ArenaError, CheckpointError, CollectiveMismatchError, EngineUnavailableError, FormatError

# The types that every rank can raise with one text, the most specific first; anything else becomes a RuntimeError on the other ranks.
_KINDS = (ArenaBudgetError, FormatError, CheckpointError, ValueError, ArenaError, EngineUnavailableError)


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, num_ranks) in `group`; None is the default group, or a world of one where torch.distributed is not initialised."""
    if group is None and not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(group: dist.ProcessGroup | None, value: object) -> list:
    """Every rank's `value`, in rank order. Sync: collective over the group."""
    _, num_ranks = rank_and_size(group)
    if num_ranks == 1:
        return [value]
    values: list = [None] * num_ranks
    dist.all_gather_object(values, value, group=group)
    return values


def agree(group: dist.ProcessGroup | None, name: str, fields: Mapping[str, object], error: Exception | None = None) -> None:
    """Raise on all ranks if one of them failed or if a field differs between them.

    Args:
        group: the EP group; None as in `rank_and_size`.
        name: what is being constructed; the messages start with it.
        fields: arguments that must be equal on all ranks, compared by repr, the first difference is reported.
        error: what went wrong on this rank before the call, or None.
    Raises:
        `error` itself: every rank has the same one.
        an error of the first failing rank's type: some ranks failed; the text holds each one's error.
        CollectiveMismatchError: a field differs; the text holds each rank's value.
    Sync: collective over the group.
    """
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    failure = None if error is None else (kind, str(error))
    reports = gather(group, (failure, {field: repr(value) for field, value in fields.items()}))
    failures = {rank: failed for rank, (failed, _) in enumerate(reports) if failed is not None}
    if len(failures) == len(reports) and len(set(failures.values())) == 1:
        raise error
    if failures:
        kind = next(iter(failures.values()))[0]
        raise kind("; ".join(f"{text} (on rank {rank})" for rank, (_, text) in failures.items())) from error
    for field in reports[0][1]:
        values = [report.get(field, "nothing") for _, report in reports]
        if len(set(values)) > 1:
            shown = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
            raise CollectiveMismatchError(f"{name}: {field} differs between ranks: {shown}; construct every rank with the same arguments")
