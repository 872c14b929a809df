"""Every MEGAMOE_* variable: name, type, default, meaning. For debugging and placement only, never for semantics.

Read once at import. An unknown MEGAMOE_* name or a value that does not parse raises, so that a typo is never ignored.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path

_PREFIX = "MEGAMOE_"
TRANSPORTS = ("auto", "arena", "nccl", "deep_ep")


def _expand(text: str) -> Path:
    """`text` with ~ replaced. A user without a home, as in many containers, gets a path that cannot be made: its users then do without."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path("/nonexistent", text.removeprefix("~/"))


@dataclass(frozen=True)
class Env:
    check: bool = False
    """MEGAMOE_CHECK=1: wait for each layer call and raise at once what the device reports, instead of at the next call."""
    cache_dir: Path = _expand("~/.cache/megamoe")
    """MEGAMOE_CACHE_DIR: where compiled kernels are kept."""
    shm_dir: Path = Path("/dev/shm")
    """MEGAMOE_SHM_DIR: the tmpfs in which CPU ranks create their arena."""
    transport: str = "auto"
    """MEGAMOE_TRANSPORT: how the unfused engine moves tokens: auto, arena (kernels over peer pointers), nccl (all-to-all) or deep_ep."""


def _parse(name: str, kind: type, text: str) -> object:
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError(f"env: {name} must be 0 or 1, got {text!r}; unset it or correct it")
        return text == "1"
    if kind is str:
        if text not in TRANSPORTS:
            raise ValueError(f"env: {name} must be one of {', '.join(TRANSPORTS)}, got {text!r}; unset it or correct it")
        return text
    return _expand(text)


def read(environ: dict[str, str]) -> Env:
    """Parse the MEGAMOE_* entries of `environ`. Raises ValueError for an unknown name or an unparsable value."""
    known = {_PREFIX + f.name.upper(): f for f in fields(Env)}
    given = {name: text for name, text in environ.items() if name.startswith(_PREFIX)}
    for name in given:
        if name not in known:
            raise ValueError(f"env: {name} must be one of {', '.join(sorted(known))}; unset it or correct it")
    return Env(**{known[name].name: _parse(name, known[name].type, text) for name, text in given.items()})


env = read(dict(os.environ))
