"""StoreWords: signal words in a store, and which backend is chosen for ranks that need them."""

import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megamoe.comm import Topology, backends
from megamoe.comm.protocol import SIGNALS
from megamoe.comm.signals import StoreWords
from megamoe.errors import ArenaError, EngineUnavailableError


class CountingStore:
    """A HashStore that counts requests for values."""

    def __init__(self):
        self._store, self.num_fetches = dist.HashStore(), 0

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.num_fetches += 1
        return self._store.multi_get(keys)

    def __getattr__(self, name: str):
        return getattr(self._store, name)


def test_words_reach_their_reader_only():
    store = CountingStore()
    words = [StoreWords(store, rank, 3) for rank in range(3)]
    assert [words[2].poll("abort", src) for src in range(3)] == [0, 0, 0]
    words[0].post(2, "abort", 1 << 61)
    words[1].post(2, "inputs_ready", 5)
    assert [words[2].poll("abort", src) for src in range(3)] == [1 << 61, 0, 0]
    assert [words[2].poll("inputs_ready", src) for src in range(3)] == [0, 5, 0]
    assert not any(words[rank].poll(signal, src) for rank in (0, 1) for signal in SIGNALS for src in range(3))


def test_one_request_brings_all_words():
    store = CountingStore()
    words = StoreWords(store, 0, 8)
    for _ in range(3):
        for signal in SIGNALS:
            for src in range(8):
                words.poll(signal, src)
    assert store.num_fetches == 3
    peer = StoreWords(store, 1, 8)
    words.poll("abort", 0)
    peer.post(0, "inputs_ready", 1)
    assert words.poll("inputs_ready", 1) == 0 and words.poll("inputs_ready", 1) == 1, "an older word is seen a poll later"
    peer.post(0, "inputs_ready", 2)
    words.post(1, "inputs_ready", 2)
    assert words.poll("inputs_ready", 1) == 2, "but not an older one than the last post"


def test_clear_forgets_everything_but_reset():
    words = StoreWords(dist.HashStore(), 0, 1)
    for signal in SIGNALS:
        words.post(0, signal, 9)
    words.poll("abort", 0)
    words.clear()
    assert {signal: words.poll(signal, 0) for signal in SIGNALS} == {signal: 9 if signal == "reset" else 0 for signal in SIGNALS}


def test_close_leaves_no_key():
    store = dist.HashStore()
    words = StoreWords(store, 0, 2)
    num_keys = store.num_keys()
    words.close()
    assert num_keys == 2 * len(SIGNALS) and store.num_keys() == 0


def test_a_store_that_has_gone():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    words = StoreWords(server.clone(), 0, 1)
    words.limit(2.0)
    del server
    message = (r"^Arena: the store of the process group must answer, got: .*; restart all ranks, since the process that holds it has ended "
               r"or cannot be reached$")
    with pytest.raises(ArenaError, match=message):
        words.poll("abort", 0)
    words.close()


@pytest.fixture
def cuda(monkeypatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return torch.device("cuda", 0)


def test_auto_takes_it_across_nvlink_domains(cuda):
    assert backends.choose("auto", Topology(0, 4, (0, 1)), cuda) == "unmapped"
    assert backends.choose("auto", Topology(0, 4, (0, 1, 2, 3)), cuda) == "torch"
    assert backends.choose("unmapped", Topology(0, 4, (0, 1, 2, 3)), cuda) == "unmapped"
    message = "Arena: backend 'torch' cannot run here: only the GPUs of ranks (0, 1) are in load/store reach of rank 0; use 'unmapped'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        backends.choose("torch", Topology(0, 4, (0, 1)), cuda)


def test_too_many_ranks(cuda):
    message = "Arena: backend 'unmapped' cannot run here: it serves at most 256 ranks and the group has 257; use a smaller group"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        backends.choose("auto", Topology(0, 257, (0, 1)), cuda)
