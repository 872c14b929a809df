"""codegen.emit_struct: the text, its meaning to a compiler, and every value it refuses."""

import enum
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from megamoe.kernels.codegen import emit_struct


class Mode(enum.Enum):
    fast = 1


@dataclass(frozen=True)
class Tile:
    rows: int
    is_last: bool


@dataclass(frozen=True)
class Everything:
    num_stages: int
    token_tiles: tuple[int, ...]
    offset: int
    bytes_total: int
    limit: float
    is_leader: bool
    mode: Mode
    epilogue: str
    tile: Tile
    deltas: tuple[int, ...]


EVERYTHING = Everything(num_stages=4, token_tiles=(8, 16, 32), offset=-3, bytes_total=2**40, limit=0.1, is_leader=True,
                        mode=Mode.fast, epilogue='say "hi"', tile=Tile(rows=64, is_last=False), deltas=(-1, 2**32))
TEXT = """\
struct Config {
  static constexpr unsigned kNumStages = 4u;
  static constexpr unsigned kNumTokenTiles = 3;
  static constexpr unsigned kTokenTiles[] = {8u, 16u, 32u};
  static constexpr int kOffset = -3;
  static constexpr unsigned long long kBytesTotal = 1099511627776ull;
  static constexpr float kLimit = 0.1f;
  static constexpr bool kIsLeader = true;
  static constexpr const char* kMode = "fast";
  static constexpr const char* kEpilogue = "say \\"hi\\"";
  struct Tile {
    static constexpr unsigned kRows = 64u;
    static constexpr bool kIsLast = false;
  };
  static constexpr unsigned kNumDeltas = 2;
  static constexpr long long kDeltas[] = {-1, 4294967296ull};
};
"""


def test_text():
    assert emit_struct("Config", EVERYTHING) == TEXT


def test_a_mapping_gives_the_same_as_a_dataclass():
    assert emit_struct("Tile", {"rows": 64, "is_last": False}) == emit_struct("Tile", Tile(rows=64, is_last=False))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_compiler_reads_the_values_back(tmp_path):
    claims = ["Config::kNumStages == 4", "Config::kTokenTiles[Config::kNumTokenTiles - 1] == 32", "Config::kOffset + 3 == 0",
              "Config::kBytesTotal == 1ull << 40", "Config::kLimit == 0.1f", "Config::kIsLeader",
              "Config::kMode[0] == 'f'", "Config::kEpilogue[4] == '\"'", "Config::Tile::kRows == 64 && !Config::Tile::kIsLast",
              "Config::kDeltas[0] + 1 == 0 && Config::kDeltas[1] == 1ll << 32", "sizeof(Config::kTokenTiles) == 12"]
    source = tmp_path / "config.cpp"
    source.write_text(emit_struct("Config", EVERYTHING) + "".join(f"static_assert({claim});\n" for claim in claims))
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", source], check=True)


KINDS = "an int, bool, float, str, Enum, tuple of these, dataclass or mapping"


@pytest.mark.parametrize("values, error, message", [
    ({"a": None}, TypeError, f"codegen: Config.a must be {KINDS}, got NoneType; convert it"),
    ({"t": {"a": [1]}}, TypeError, f"codegen: Config.t.a must be {KINDS}, got list; convert it"),
    ({"a": (1, (2,))}, TypeError, f"codegen: Config.a[1] must be {KINDS}, got tuple; convert it"),
    ({"a": (1, 2.0)}, TypeError, "codegen: Config.a must have elements of one type, got float, unsigned; split it"),
    ({"a": ()}, ValueError, "codegen: Config.a must have at least one element, got (); C++ has no empty array"),
    ({"a": float("nan")}, ValueError, "codegen: Config.a must be finite, got nan; use a flag for 'none'"),
    ({"a": -float("inf")}, ValueError, "codegen: Config.a must be finite, got -inf; use a flag for 'none'"),
    ({"a": 2**64}, ValueError, "codegen: Config.a must fit 64 bits, got 18446744073709551616; split it"),
    ({"num_tiles": 2, "tiles": (8, 16)}, ValueError, "codegen: Config.tiles must give a new name, got kNumTiles twice; rename the field"),
    (7, TypeError, "codegen: Config must be a dataclass or a mapping, got int; wrap it in one"),
    (Tile, TypeError, "codegen: Config must be a dataclass or a mapping, got type; wrap it in one"),
])
def test_what_cannot_be_written_is_refused(values, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        emit_struct("Config", values)
