"""The one table of the arena: which region lies where, who writes it, who reads it, and what publishes it.

Sizes, torch views, the CUDA `struct Layout` and docs/protocol.md are generated from it; `pack` is the only offset arithmetic. A region is
named as kernels and engines name it. Shapes: `W` ranks, `T` tokens of one rank at most, `K` top-k slots, `H` hidden, `I` intermediate,
`P` pool rows, `LINE` int64 words of one 128-byte line.
"""

import hashlib
from dataclasses import asdict, dataclass

import torch

from megamoe.config import FP8_PRECISIONS, PRECISIONS, X_GROUP
from megamoe.errors import check

LINE_WORDS = 16  # one signal word per 128-byte line: peers that write different words never share a line
EVERY = PRECISIONS
_ROW_DTYPE = {**dict.fromkeys(FP8_PRECISIONS, torch.float8_e4m3fn), "bf16": torch.bfloat16, "fp32": torch.float32}
_PARTIAL_DTYPE = {**dict.fromkeys(EVERY, torch.bfloat16), "fp32": torch.float32}
_CPP_TYPE = {torch.int64: "megamoe::int64", torch.float32: "float", torch.uint8: "megamoe::uint8", torch.bfloat16: "megamoe::Bf16",
             torch.float8_e4m3fn: "megamoe::E4m3"}


@dataclass(frozen=True)
class ArenaDims:
    """The sizes a layout depends on; equal on all ranks of a group."""

    num_ranks: int
    max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int
    intermediate: int
    precision: str
    pool_rows: int

    def extent(self, symbol: str) -> int:
        """The size a symbol of the table stands for."""
        return {"W": self.num_ranks, "T": self.max_tokens, "K": self.num_topk, "H": self.hidden, "I": self.intermediate,
                "H/32": -(-self.hidden // X_GROUP), "I/32": -(-self.intermediate // X_GROUP), "P": self.pool_rows,
                "LINE": LINE_WORDS, "1": 1}[symbol]


@dataclass(frozen=True, kw_only=True)
class Region:
    """One row of the table. `dtype` is a torch dtype name, or "row" or "partial", which the precision decides."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    writer: str
    reader: str
    signal: str
    resetter: str
    purpose: str
    precisions: tuple[str, ...] = EVERY
    alignment: int = 1024

    def torch_dtype(self, precision: str) -> torch.dtype:
        by_precision = {"row": _ROW_DTYPE, "partial": _PARTIAL_DTYPE}.get(self.dtype)
        return by_precision[precision] if by_precision else getattr(torch, self.dtype)


def _signal(name: str, reader: str, resetter: str, purpose: str) -> Region:
    return Region(name=name, shape=("W", "LINE"), dtype="int64", writer="rank w writes row w", reader=reader, signal="itself",
                  resetter=resetter, purpose=purpose)


def _inputs(name: str, shape: tuple[str, ...], dtype: str, purpose: str, precisions: tuple[str, ...] = EVERY) -> Region:
    return Region(name=name, shape=shape, dtype=dtype, writer="owner", reader="every rank", signal="inputs_ready",
                  resetter="owner's next call", purpose=purpose, precisions=precisions)


def _pool(name: str, shape: tuple[str, ...], dtype: str, purpose: str, precisions: tuple[str, ...] = EVERY) -> Region:
    return Region(name=name, shape=shape, dtype=dtype, writer="owner", reader="owner", signal="none (local)",
                  resetter="the next chunk", purpose=purpose, precisions=precisions)


REGIONS: tuple[Region, ...] = (
    _signal("inputs_ready", "owner", "Arena.reset", "epoch whose inputs rank w has published"),
    _signal("combine_ready", "owner", "Arena.reset", "epoch whose partials rank w has pushed here, having read our inputs"),
    _signal("abort", "owner, in every wait", "Arena.reset", "0, or the call that rank w left early and why: comm/abort.py"),
    _signal("barrier", "owner", "Arena.reset", "number of barriers rank w has entered"),
    _signal("reset", "owner", "never: it only grows", "steps of Arena.reset that rank w has entered"),
    _inputs("num_tokens", ("1",), "int64", "tokens of this call"),
    _inputs("topk_idx", ("T", "K"), "int64", "global expert per slot, -1 for none"),
    _inputs("topk_weights", ("T", "K"), "float32", "weight per slot"),
    _inputs("x", ("T", "H"), "row", "token rows, quantised in the fp8 precisions; for mega_moe in thread order"),
    _inputs("x_sf", ("T", "H/32"), "uint8", "UE8M0 scale per 32 channels of x; equal within a token if staged by kernels", FP8_PRECISIONS),
    _pool("pool_x", ("P", "H"), "row", "ring of rows pulled for the local experts"),
    _pool("pool_x_sf", ("P", "H/32"), "uint8", "scales of pool_x", FP8_PRECISIONS),
    _pool("pool_a", ("P", "I"), "row", "ring of activated rows between the two linears"),
    _pool("pool_a_sf", ("P", "I/32"), "uint8", "scales of pool_a, at most one per 32 channels",
          FP8_PRECISIONS),
    Region(name="partials", shape=("T", "K", "H"), dtype="partial", writer="the rank that owns the slot's expert", reader="owner",
           signal="combine_ready", resetter="the next call, after inputs_ready", purpose="one expert output per (token, slot)"),
)
SIGNALS = tuple(region.name for region in REGIONS if region.signal == "itself")


@dataclass(frozen=True)
class Placement:
    """One region of a packed layout: offset and num_bytes in bytes, shape in elements."""

    region: Region
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')} at {self.offset}"


@dataclass(frozen=True)
class Layout:
    """Where every region of one arena lies."""

    dims: ArenaDims
    placements: dict[str, Placement]
    num_bytes: int

    @property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each region."""
        return {name: place.offset for name, place in self.placements.items()}

    @property
    def hash(self) -> str:
        """16 hex digits over the dims and every column of every row."""
        text = repr((asdict(self.dims), sorted((str(place), repr(place.region)) for place in self.placements.values())))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def view(self, name: str, arena_bytes: torch.Tensor) -> torch.Tensor:
        """The region as a tensor that shares memory with the arena.

        Args:
            name: a region of this layout's precision.
            arena_bytes: [num_bytes] uint8, the memory of one rank.
        Returns:
            A contiguous tensor of the region's shape and dtype.
        Raises:
            ValueError: this layout has no such region.
        """
        names = tuple(self.placements)
        check(name in self.placements, "Arena", "region", f"one of {names}", repr(name), f"precision is {self.dims.precision!r}")
        place = self.placements[name]
        return arena_bytes[place.offset:place.offset + place.num_bytes].view(place.dtype).view(place.shape)


def pack(dims: ArenaDims) -> Layout:
    """Place the regions of `dims.precision` one after the other, each at its alignment."""
    placements, end = {}, 0
    for region in REGIONS:
        if dims.precision not in region.precisions:
            continue
        shape = tuple(dims.extent(symbol) for symbol in region.shape)
        dtype = region.torch_dtype(dims.precision)
        offset = -(-end // region.alignment) * region.alignment
        num_bytes = dtype.itemsize
        for extent in shape:
            num_bytes *= extent
        placements[region.name] = Placement(region, shape, dtype, offset, num_bytes)
        end = offset + num_bytes
    return Layout(dims, placements, -(-end // 1024) * 1024)


def emit_struct(layout: Layout) -> str:
    """The layout as C++: `struct Layout` with one offset, the extents and one typed accessor per region.

    Returns:
        Text for a file that has included <megamoe/comm/symm.cuh>. `Layout::x(base, i0, i1)` points at element (i0, i1) of x in the arena
        that starts at `base`; all index math is 64-bit.
    """
    lines = [f"struct Layout {{  // {layout.dims}",
             f"  static constexpr megamoe::uint64 num_bytes = {layout.num_bytes}ull, hash = 0x{layout.hash}ull;"]
    for place in layout.placements.values():
        lines += _emit_region(place)
    return "\n".join([*lines, "};", ""])


def _emit_region(place: Placement) -> list[str]:
    name, cpp_type = place.region.name, _CPP_TYPE[place.dtype]
    arguments = ", ".join(f"megamoe::uint64 i{axis}" for axis in range(len(place.shape)))
    extents = ", ".join(f"{name}_extent_{axis} = {extent}ull" for axis, extent in enumerate(place.shape))
    index = "i0"
    for axis in range(1, len(place.shape)):
        index = f"({index}) * {name}_extent_{axis} + i{axis}"
    return ["",
            f"  // [{', '.join(place.region.shape)}] {place.region.purpose}; published by {place.region.signal}",
            f"  static constexpr megamoe::uint64 {name}_offset = {place.offset}ull, {extents};",
            f"  MEGAMOE_HOST_DEVICE static {cpp_type}* {name}(megamoe::uint8* base, {arguments}) {{",
            f"    return reinterpret_cast<{cpp_type}*>(base + {name}_offset) + ({index});",
            "  }"]


def emit_markdown() -> str:
    """The table as docs/protocol.md."""
    head = ["# The arena's regions", "",
            "Generated by `megamoe.comm.protocol.emit_markdown`; edit the table there. Each rank owns one arena; \"owner\" is that rank.",
            "`T` tokens at most, `K` top-k, `W` ranks, `P` pool rows, `H` hidden, `I` intermediate; `LINE` is 16 words, as each signal",
            "word stands alone on a 128-byte line. `row` is E4M3 in the fp8 precisions, otherwise BF16 or FP32; `partial` is BF16, or FP32",
            "in the fp32 precision. Regions are aligned to 1024 bytes.", "",
            "| region | shape | dtype | precisions | written by | read by | published by | reset by | holds |",
            "|---|---|---|---|---|---|---|---|---|"]
    rows = [f"| `{r.name}` | [{', '.join(r.shape)}] | {r.dtype} | {'all' if r.precisions == EVERY else ', '.join(r.precisions)} "
            f"| {r.writer} | {r.reader} | {r.signal} | {r.resetter} | {r.purpose} |" for r in REGIONS]
    return "\n".join([*head, *rows, ""])
