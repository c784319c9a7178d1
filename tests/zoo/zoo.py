"""The hang zoo: small real programs, each hung in its own way, and what must come of them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.nursery import LIMIT
from support.pairs import Pair
from support.watchers import RunningWatcher, wait_until

PROGRAMS = Path(__file__).parent / "programs"
KILLED = -9


@dataclass(frozen=True)
class Animal:
    """One program of the zoo.

    Attributes:
        name: its file.
        scope: the scope that overruns.
        status: how the program that we start ends: killed itself, or 0 if it was a child
            of it that hung and was killed.
        missing: what the report must say is missing, instead of Python stacks.
        frames: least number of frames of the hung thread.
    """

    name: str
    scope: str
    status: int = KILLED
    missing: str | None = None
    frames: int = 2


ANIMALS = [
    Animal("gil_in_c", "gil in c"),
    Animal("sleep", "sleep"),
    Animal("futex_deadlock", "deadlock"),
    Animal("silent_pipe", "pipe"),
    Animal("busy_python", "busy python"),
    Animal("busy_c", "busy c"),
    Animal("regular_expression", "regex"),
    Animal("stopped", "stopped", missing="it is stopped (state T)"),
    Animal("signals_masked", "masked", missing="masks the request's signal"),
    Animal("other_thread", "other thread"),
    Animal("forked_child", "forked child", status=0),
    Animal("mp_fork", "mp fork", status=0),
    Animal("mp_spawn", "mp spawn", status=0),
    Animal("mp_forkserver", "mp forkserver", status=0),
    Animal("executor", "executor", status=0),
    Animal("sigterm_ignored", "sigterm ignored"),
    Animal("in_asyncio", "asyncio"),
    Animal("deep", "deep", frames=62),
]


def meet(animal: Animal, watcher: RunningWatcher) -> dict[str, Any]:
    """Run a program until its hang was ended; check the report, and return it."""
    label = os.urandom(8).hex()
    environment = watcher.environment(TORCHELASTIC_RUN_ID=label)
    path = PROGRAMS / f"{animal.name}.py"
    program = watcher.worker(
        path.read_text(), file=str(path), env=environment, stdout=subprocess.DEVNULL
    )
    try:
        status = program.wait(LIMIT)
    finally:
        program.kill()
        program.wait()
    assert status == animal.status, f"{animal.name} ended with {status}"
    report = watcher.report(name=animal.scope, labels={"run_id": label})
    check(animal, report)
    return report


def meet_in_pair(animal: Animal, pair: Pair, reports: Path) -> dict[str, Any]:
    """Run a program as a worker of a drop-in pair until its hang was ended.

    Args:
        animal: one that is killed itself.
        pair: its server runs.
        reports: the server's report folder, empty.

    Returns:
        The report, checked.
    """
    worker = pair.worker(_run, str(PROGRAMS / f"{animal.name}.py"))
    worker.join(LIMIT)
    assert worker.exitcode == KILLED, f"{animal.name} ended with {worker.exitcode}"
    found: list[Path] = []

    def look() -> bool:
        found[:] = reports.glob("[!.]*/report.json")
        return bool(found)

    wait_until(look, "a report")
    report: dict[str, Any] = json.loads(found[0].read_text())
    assert report["worker"]["pid"] == worker.pid
    check(animal, report)
    return report


def _run(program: str) -> None:
    runpy.run_path(program, run_name="__main__")


def check(animal: Animal, report: dict[str, Any]) -> None:
    """Check what a report says of a program of the zoo."""
    assert report["outcome"] == "reaped"
    assert report["scope"]["limit_s"] == 0.4
    holders = [thread for thread in report["threads"] if thread["holds_scope"]]
    if animal.missing is not None:
        assert not holders
        assert any(animal.missing in reason for reason in report["missing"]), report["missing"]
        return
    assert len(holders) == 1, report["missing"]
    frames = [frame["function"] for frame in holders[0]["frames"]]
    assert "stuck_here" in frames
    assert len(frames) >= animal.frames
