"""ArenaTransport: kernels that pull and push over peer pointers inside an NVLink domain. Stream-ordered, capturable."""

from megamoe.comm import Arena
from megamoe.kernels.moe_dispatch import ArenaDispatch, PulledRows


class ArenaTransport:
    """ArenaDispatch over an arena whose calls the device drives. Linear 2 itself pushes each row into its source rank's `partials`."""

    is_capturable = True
    scatters = True

    def __init__(self, arena: Arena):
        calls = arena.drive_by_device()
        self._dispatch = ArenaDispatch(arena.layout, arena.rank, arena.peer_ptrs, arena.own_bytes, arena.device, calls)
        self._arena = arena
        self.num_passes = self._dispatch.num_passes

    def dispatch(self, x, x_sf, topk_idx, topk_weights, expert_load) -> None:
        self._dispatch.stage(x, x_sf, topk_idx, topk_weights)
        self._arena.note_published()
        self._dispatch.route(expert_load)

    def rows(self, pass_idx: int) -> PulledRows:
        return self._dispatch.pull(pass_idx)

    def push(self, rows: PulledRows) -> None:
        """Nothing: linear 2 wrote its rows to `row_dst`."""

    def finish(self, y) -> None:
        self._dispatch.combine(y)
