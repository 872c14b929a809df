"""Planted bugs: every mutant of the protocol must be caught by the program that the table names."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import programs
from megamoe.kernels.compiler import include_dir
from mutants import MUTANTS, ROLES, Mutant

TRIES = 12  # seeds that a mutant may survive
PROGRAMS = {"calls": "calls", "clusters": "calls", "races": "calls", "order": "order", "explore": "explore"}
IMPATIENT = {"patience_ms": 1000, "limit_s": 8}
ARGUMENTS = {"calls": {"calls": 40, "ranks": 2, "blocks": 3, "cluster": 1} | IMPATIENT,
             "clusters": {"calls": 40, "ranks": 2, "blocks": 4, "cluster": 2} | IMPATIENT,
             "races": {"calls": 25, "ranks": 2, "blocks": 3, "cluster": 1, "patience_ms": 3000, "limit_s": 20},
             "order": {}, "explore": {"missing_slots": 0, "holds_rows": 0}}
FAILURE = {"blocks": 4, "cluster": 1, "hasty_ms": 200, "patience_ms": 2000, "limit_s": 6}


def mutate(mutant: Mutant, folder) -> dict[str, Path]:
    """Copies of the headers and of this folder's, with the bug in one of them, as arguments of `programs.build`."""
    copies = {"headers": folder / "include", "sources": folder / "sources"}
    shutil.copytree(include_dir(), copies["headers"])
    shutil.copytree(programs.HERE, copies["sources"], ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = copies["sources"] / mutant.file if mutant.file == ROLES else copies["headers"] / "megamoe" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times: bring the table up to date"
    path.write_text(text.replace(mutant.old, mutant.new))
    return copies


def hunt(mutant: Mutant, folder) -> list[programs.Run]:
    """Runs of the program with the bug, up to the first that catches it."""
    programs.write_layout(folder)
    name = PROGRAMS.get(mutant.check, "failures")
    program = programs.build(name, folder, sanitized=mutant.check == "races", **mutate(mutant, folder))
    arguments = ARGUMENTS.get(mutant.check, FAILURE | {"scenario": mutant.check})
    runs = []
    for seed in range(TRIES if name in ("calls", "failures") else 1):
        runs.append(programs.run(program, seed=seed, **arguments))
        if runs[-1].code != 0:
            break
    return runs


@pytest.fixture(scope="session")
def hunts(request, tmp_path_factory, build_dir):
    """The hunts for all mutants that this session asks for, two at a time."""
    wanted = [item.callspec.params["mutant"] for item in request.session.items if item.originalname == test_mutant_is_caught.__name__]
    with ThreadPoolExecutor(2) as pool:
        yield {mutant.name: pool.submit(hunt, mutant, tmp_path_factory.mktemp(mutant.name)) for mutant in wanted}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(hunts, mutant):
    runs = hunts[mutant.name].result()
    assert runs[-1].code in mutant.codes, f"after {len(runs)} runs: {runs[-1]}"
