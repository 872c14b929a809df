"""Programs of this folder, built once per session."""

import shutil

import pytest

import programs


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("protocol")
    programs.write_layout(folder)
    if not programs.can_sanitize(folder):
        pytest.skip("needs g++ with ThreadSanitizer")
    return folder


@pytest.fixture(scope="session")
def program(build_dir):
    """program(name, sanitized=False): the program, compiled when it is first asked for."""
    built = {}

    def get(name, sanitized=False):
        if (name, sanitized) not in built:
            built[name, sanitized] = programs.build(name, build_dir, sanitized=sanitized)
        return built[name, sanitized]

    return get
