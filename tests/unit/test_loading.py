"""Loading kernels ahead of calls: each text is compiled before any is loaded, and nothing twice on one device."""

from megamoe.kernels import loading


def test_kernels_are_compiled_together_and_loaded_once(monkeypatch):
    events: list[tuple] = []
    monkeypatch.setattr(loading, "_loaded", set())
    monkeypatch.setattr(loading.jit, "fetch", lambda op, text, arch: events.append(("fetch", op, text, arch)))
    monkeypatch.setattr(loading.jit, "build", lambda op, config, make, entry, device: events.append(("build", op, config, entry, device)))
    kernels = [("op", size, lambda size=size: f"text {size}", "entry") for size in (1, 2)]
    loading.load_kernels(kernels, device=3)
    assert sorted(events[:2]) == [("fetch", "op", f"text {size}", "sm_90a") for size in (1, 2)]
    assert events[2:] == [("build", "op", size, "entry", 3) for size in (1, 2)]
    events.clear()
    loading.load_kernels([*kernels, ("other op", 1, lambda: "text", "entry")], device=3)
    assert events == [("fetch", "other op", "text", "sm_90a"), ("build", "other op", 1, "entry", 3)]
    events.clear()
    loading.load_kernels(kernels[:1], device=4)
    assert [event[0] for event in events] == ["fetch", "build"], "another device has loaded nothing"
