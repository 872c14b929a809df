"""megamoe.env: every variable parses to its type, and a typo is never ignored."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.env import Env, read


def test_defaults():
    assert read({}) == Env(check=False, cache_dir=Path.home() / ".cache/megamoe", shm_dir=Path("/dev/shm"), transport="auto")


def test_every_variable_is_parsed():
    environ = {"MEGAMOE_CHECK": "1", "MEGAMOE_CACHE_DIR": "~/kernels", "MEGAMOE_SHM_DIR": "/mnt/huge",
               "MEGAMOE_TRANSPORT": "nccl"}
    assert read(environ) == Env(check=True, cache_dir=Path.home() / "kernels", shm_dir=Path("/mnt/huge"), transport="nccl")


def test_other_variables_are_not_ours():
    assert read({"PATH": "/bin", "MEGAMOEBA": "1", "megamoe_check": "1"}) == Env()


@pytest.mark.parametrize("text", ["", "yes", "True", "2", " 1"])
def test_a_flag_is_0_or_1(text):
    assert read({"MEGAMOE_CHECK": "0"}).check is False
    message = f"env: MEGAMOE_CHECK must be 0 or 1, got {text!r}; unset it or correct it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read({"MEGAMOE_CHECK": text})


def test_a_transport_is_one_of_those_there_are():
    for transport in ("auto", "arena", "nccl", "deep_ep"):
        assert read({"MEGAMOE_TRANSPORT": transport}).transport == transport
    message = "env: MEGAMOE_TRANSPORT must be one of auto, arena, nccl, deep_ep, got 'ib'; unset it or correct it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read({"MEGAMOE_TRANSPORT": "ib"})


def test_an_unknown_variable_is_refused():
    message = "env: MEGAMOE_CHEK must be one of MEGAMOE_CACHE_DIR, MEGAMOE_CHECK, MEGAMOE_SHM_DIR, MEGAMOE_TRANSPORT; unset it or correct it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read({"MEGAMOE_CHEK": "1"})


def test_the_environment_is_read_at_import():
    command = [sys.executable, "-c", "from megamoe.env import env; print(env.shm_dir)"]
    environ = os.environ | {"MEGAMOE_SHM_DIR": "/mnt/huge"}
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True)
    assert run.stdout == "/mnt/huge\n", run.stderr
