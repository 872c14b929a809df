"""`python -m megamoe.prewarm`: fills the cache without a GPU, says what failed, and refuses what would keep nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megamoe
from megamoe import prewarm
from megamoe.env import Env
from megamoe.errors import EngineUnavailableError
from megamoe.kernels import compiler, jit

GOOD = 'extern "C" __global__ void nothing(int* x) { *x = VALUE; }\n'
needs_compiler = pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for module in (jit, prewarm):
        monkeypatch.setattr(module, "env", Env(cache_dir=tmp_path / "cache"))
    monkeypatch.setattr(jit, "_fallback", None)

    def shipped(models):
        return [("nothing", model, lambda i=i: GOOD.replace("VALUE", str(i)), "nothing") for i, model in enumerate(models)]

    monkeypatch.setattr(prewarm, "shipped_kernels", shipped)
    return tmp_path / "cache"


@needs_compiler
def test_fills_the_cache(folder, capsys):
    assert prewarm.main(["--model", "v3", "v4-pro", "--jobs", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == f"2 of 2 kernels for sm_90a are in {folder}\n"
    assert "2/2" in output.err, "the progress bar"
    entries = {path: path.stat().st_mtime_ns for path in folder.glob("nothing-*.cubin")}
    assert len(entries) == 2
    assert prewarm.main(["--model", "v3", "v4-pro"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("nothing-*.cubin")} == entries, "what is there is not compiled again"


@needs_compiler
def test_one_that_fails_does_not_stop_the_others(folder, capsys, monkeypatch):
    kernels = [("bad", "config", lambda: GOOD, "nothing"), ("good", "config", lambda: GOOD.replace("VALUE", "1"), "nothing")]
    monkeypatch.setattr(prewarm, "shipped_kernels", lambda models: kernels)
    assert prewarm.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bad config: kernels: nvcc ") and 'error: identifier "VALUE" is undefined' in lines[1]
    assert lines[-1] == f"1 of 2 kernels for sm_90a are in {folder}"
    assert len(list(folder.glob("good-*.cubin"))) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_failure(folder, capsys, monkeypatch):
    for module in (jit, prewarm):
        monkeypatch.setattr(module, "env", Env(cache_dir=Path("/proc/megamoe")))
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert prewarm.main(["--model", "v3"]) == 1
    assert capsys.readouterr().err.endswith("prewarm: /proc/megamoe cannot be written, nothing was kept\n")


def test_no_compiler(folder, capsys, monkeypatch):
    def find_compiler():
        raise EngineUnavailableError("kernels: no compiler")

    monkeypatch.setattr(prewarm, "find_compiler", find_compiler)
    assert prewarm.main([]) == 1
    assert capsys.readouterr().err == "kernels: no compiler\n" and not folder.exists()


@pytest.mark.parametrize("argv, message", [
    (["--jobs", "0"], "error: argument --jobs: must be at least 1, got 0"),
    (["--model", "gpt-2"], "argument --model: invalid choice: 'gpt-2'")])
def test_bad_arguments(folder, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        prewarm.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@needs_compiler
def test_as_a_program(tmp_path):
    """One shipped kernel for one model, as a user calls it."""
    program = ("import sys; from megamoe import prewarm; shipped = prewarm.shipped_kernels; "
               "prewarm.shipped_kernels = lambda models: [k for k in shipped(models) if k[0] == 'layout_probe'][:1]; "
               "sys.exit(prewarm.main(['--model', 'v3']))")
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(megamoe.__file__).parents[1], capture_output=True, text=True,
                         env=os.environ | {"MEGAMOE_CACHE_DIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"1 of 1 kernels for sm_90a are in {tmp_path}\n"
    assert len(list(tmp_path.glob("layout_probe-*.cubin"))) == 1
