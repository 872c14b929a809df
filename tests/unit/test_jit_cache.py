"""megamoe.kernels.jit without a GPU: what is compiled once, what is compiled again, and what a damaged or unusable folder does."""

import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import megamoe.env as env_module
from megamoe.env import Env
from megamoe.kernels import jit
from megamoe.kernels.compiler import CompileError, Compiler, Cubin

SOURCE = 'extern "C" __global__ void nothing() {}\n'


class FakeCompiler:
    """Takes 0.2 s and writes a line to `calls` each time; lets the test change what the key is made of."""

    def __init__(self, calls: Path):
        self.calls = calls
        self.found = Compiler("nvcc", "V1", "/bin/nvcc")

    def compile_cubin(self, source, arch, compiler, path):
        path.write_text(source)
        with open(self.calls, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        if "error" in source:
            raise CompileError(f"kernels: nvcc V1 refused {path}:\nerror")
        return Cubin(source.encode() + b"\0" * 100, "the log", 40, 8, 4)

    @property
    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeCompiler:
    fake = FakeCompiler(tmp_path / "calls")
    headers = tmp_path / "include/megamoe"
    headers.mkdir(parents=True)
    (headers / "a.cuh").write_text("// a")
    monkeypatch.setattr(jit, "env", Env(cache_dir=tmp_path / "cache"))
    monkeypatch.setattr(jit, "compile_cubin", fake.compile_cubin)
    monkeypatch.setattr(jit, "find_compiler", lambda requested: fake.found)
    monkeypatch.setattr(jit, "include_dir", lambda: tmp_path / "include")
    monkeypatch.setattr(jit, "_fallback", None)
    return fake


def entry_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.cubin")
    return path


def test_the_second_time_is_read_from_disk(fake, tmp_path):
    first = jit.fetch("op", SOURCE, "sm_90a")
    assert first == Cubin(SOURCE.encode() + b"\0" * 100, "the log", 40, 8, 4)
    assert jit.fetch("op", SOURCE, "sm_90a") == first
    assert fake.num_calls == 1
    path = entry_file(tmp_path)
    assert re.fullmatch(r"op-[0-9a-f]{64}\.cubin", path.name)
    assert path.with_suffix(".cu").read_text() == SOURCE and path.with_suffix(".log").read_text() == "the log"
    assert {p.suffix for p in path.parent.iterdir()} == {".cubin", ".cu", ".log", ".lock"}, "no temporary file stays"


def fetch_in_child(barrier, results) -> None:
    barrier.wait()
    results.put(jit.fetch("op", SOURCE, "sm_90a").code)


def test_eight_processes_compile_once(fake):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    children = [context.Process(target=fetch_in_child, args=(barrier, results)) for _ in range(8)]
    for child in children:
        child.start()
    codes = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert codes == {SOURCE.encode() + b"\0" * 100}
    assert fake.num_calls == 1


def test_eight_threads_compile_once(fake):
    threads = [threading.Thread(target=jit.fetch, args=("op", SOURCE, "sm_90a")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.num_calls == 1


def test_a_process_that_dies_while_compiling_blocks_nobody(fake, tmp_path):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=jit.fetch, args=("op", SOURCE, "sm_90a"))
    child.start()
    while fake.num_calls == 0:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert list((tmp_path / "cache").glob("*.cubin")) == []
    assert jit.fetch("op", SOURCE, "sm_90a").num_registers == 40
    assert fake.num_calls == 2


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:40], lambda data: b"", lambda data: data[:-5] + b"\x01" + data[-4:],
    lambda data: b"x" + data[1:], lambda data: data + b"\0"],
    ids=["last byte lost", "header only", "empty", "a byte flipped", "other magic", "a byte more"])
def test_a_damaged_entry_is_compiled_again(fake, tmp_path, damage):
    good = jit.fetch("op", SOURCE, "sm_90a")
    path = entry_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert jit.fetch("op", SOURCE, "sm_90a") == good
    assert fake.num_calls == 2 and path.read_bytes() == data


def test_an_entry_of_another_key_is_not_taken(fake, tmp_path):
    jit.fetch("op", SOURCE, "sm_90a")
    path = entry_file(tmp_path)
    other = jit.cache_key(SOURCE + "// v2", "sm_90a")
    path.rename(path.with_name(f"op-{other.hex()}.cubin"))
    assert jit.fetch("op", SOURCE + "// v2", "sm_90a").code.startswith(SOURCE.encode() + b"// v2")
    assert fake.num_calls == 2


def test_the_key_changes_with_everything_the_code_depends_on(fake, tmp_path, monkeypatch):
    header = tmp_path / "include/megamoe/a.cuh"

    def key() -> bytes:
        return jit.cache_key(SOURCE, "sm_90a")

    keys = [key(), jit.cache_key(SOURCE + " ", "sm_90a"), jit.cache_key(SOURCE, "sm_100a")]
    fake.found = Compiler("nvcc", "V2", "/bin/nvcc")
    keys.append(key())
    fake.found = Compiler("nvrtc", "V1", None)
    keys.append(key())
    fake.found = Compiler("nvcc", "V1", "/elsewhere/nvcc")
    assert key() == keys[0], "the same compiler in another place gives the same code"
    with monkeypatch.context() as flags:
        flags.setattr(jit, "FLAGS", (*jit.FLAGS, "-G"))
        keys.append(key())
    assert key() == keys[0]
    header.write_text("// b")
    keys.append(key())
    header.rename(header.with_name("b.cuh"))
    keys.append(key())
    assert len(set(keys)) == len(keys) == 8


def test_a_changed_header_compiles_again(fake, tmp_path):
    jit.fetch("op", SOURCE, "sm_90a")
    (tmp_path / "include/megamoe/a.cuh").write_text("// changed")
    jit.fetch("op", SOURCE, "sm_90a")
    assert fake.num_calls == 2


def test_an_error_reaches_the_caller_and_is_not_kept(fake, tmp_path):
    for _ in range(2):
        with pytest.raises(CompileError) as caught:
            jit.fetch("op", "error", "sm_90a")
        path = re.search(r"refused (\S+):\nerror$", str(caught.value))[1]
        assert Path(path).parent == tmp_path / "cache" and Path(path).read_text() == "error"
    assert fake.num_calls == 2


def unusable(tmp_path: Path, how: str) -> Path:
    """A folder that cannot hold entries, and the error it gives. Root may write to read-only folders, so /proc stands for those."""
    if how == "is a file":
        (tmp_path / "file").touch()
        return tmp_path / "file/cache"
    return Path("/proc/megamoe")


@pytest.mark.parametrize("how", ["is a file", "read-only"])
def test_a_folder_that_cannot_be_written_costs_one_warning(fake, tmp_path, monkeypatch, how):
    folder = unusable(tmp_path, how)
    monkeypatch.setattr(jit, "env", Env(cache_dir=folder))
    where = re.escape(str(folder))
    expected = (rf"^kernels: the cache in {where} cannot be used \(.*{where}'\), so every process compiles for itself; "
                r"set MEGAMOE_CACHE_DIR to a folder that can be written$")
    with pytest.warns(RuntimeWarning, match=expected) as caught:
        first = jit.fetch("op", SOURCE, "sm_90a")
        assert jit.fetch("op", SOURCE, "sm_90a") == first
        jit.fetch("op", SOURCE + "// v2", "sm_90a")
    assert len(caught) == 1
    assert fake.num_calls == 2, "the second time comes from the process's own folder"
    assert not folder.exists() and jit.folder().is_dir() and jit.folder() != folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder(fake, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert jit.fetch("op", SOURCE, "sm_90a").num_registers == 40


def test_entries_of_a_read_only_folder_are_used(fake, tmp_path, monkeypatch):
    good = jit.fetch("op", SOURCE, "sm_90a")
    for path in (tmp_path / "cache").glob("*.lock"):
        path.unlink()
    monkeypatch.setattr(jit, "_locked", None)  # whoever would write, would lock
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.fetch("op", SOURCE, "sm_90a") == good


def test_a_folder_without_locks_still_works(fake, monkeypatch):
    def refuse(file, operation):
        raise OSError("no locks")

    monkeypatch.setattr(jit.fcntl, "flock", refuse)
    assert jit.fetch("op", SOURCE, "sm_90a") == jit.fetch("op", SOURCE, "sm_90a")
    assert fake.num_calls == 1


def test_the_folder_of_a_process_goes_with_it(tmp_path):
    program = ("import warnings; warnings.simplefilter('ignore'); from megamoe.kernels import jit; "
               "print(jit._fallback_folder(OSError('why'))); assert jit.folder().is_dir()")
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
                         env=os.environ | {"TMPDIR": str(tmp_path)})
    folder = Path(run.stdout.strip())
    assert folder.parent == tmp_path and not folder.exists()


def test_a_user_without_a_home(monkeypatch):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(env_module.Path, "expanduser", expanduser)
    assert env_module._expand("~/.cache/megamoe") == Path("/nonexistent/.cache/megamoe")


class FakeKernel:
    def __init__(self, name, cubin, entry, device):
        self.made_of = (name, cubin.num_registers, entry, device)


def test_loaded_kernels_are_found_before_any_text_is_made(fake, monkeypatch):
    texts = []

    def make_source() -> str:
        texts.append(SOURCE)
        return SOURCE

    monkeypatch.setattr(jit, "Kernel", FakeKernel)
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr(jit.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(jit.torch.cuda, "current_device", lambda: 1)
    first = jit.build("op", (8, 16), make_source, "entry", 0)
    assert first.made_of == ("op", 40, "entry", 0)
    assert jit.build("op", (8, 16), make_source, "entry", 0) is first and len(texts) == 1
    other = jit.build("op", (8, 16), make_source, "entry")
    assert other.made_of == ("op", 40, "entry", 1) and fake.num_calls == 1, "another device loads the same code"
    assert jit.build("op", (8, 32), make_source, "entry", 0) is not first and len(texts) == 3
    jit.use_compiler("auto")
    assert jit.build("op", (8, 16), make_source, "entry", 0) is not first, "another compiler, another kernel"
    count, begin = 20000, time.perf_counter()
    for _ in range(count):
        jit.build("op", (8, 16), make_source, "entry", 0)
    microseconds = (time.perf_counter() - begin) / count * 1e6
    assert microseconds < 5, f"{microseconds:.2f} us"  # 0.2 on an idle core
