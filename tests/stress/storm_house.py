"""The server's process in a kill storm, and what must be left of everything in the end."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from hangwatch import linux
from stress.storm_board import FORKERS, Board, Gate, Problems, fork
from stress.storm_forker import storm
from stress.storm_nursery import Nursery
from stress.storm_workers import Timers
from support.processes import is_alive, open_files
from support.watchers import wait_until, watcher_below

NATIVE = "native"
"""The way that our clients find by themselves, through the watcher beside the server."""
LEGACY = "legacy"
"""The way through the queue, which is PyTorch's only one."""
_SOON = 0.1
_STOPS_WITHIN = 5.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One storm.

    Attributes:
        road: `NATIVE` or `LEGACY`.
        kills: how many victims are killed.
        every: after how many kills a fresh worker, and a survivor, hang.
        seed: of the dice.
        folder: for its log, and all that it leaves.
    """

    road: str
    kills: int
    every: int
    seed: int
    folder: Path


def keep_house(module: Any, plan: Plan, board: Board) -> None:
    """Be the server's process of one storm; the figures are in the folder in the end."""
    log = os.open(plan.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    linux.become_subreaper()  # whatever is left behind comes to us
    problems = Problems(plan.folder / "problems", board)
    timers = Timers(module, multiprocessing.get_context("fork").Queue())
    gates = Gate(), Gate()
    gc.freeze()
    # Before the server has threads: whoever forks all the time has none.
    bodies = [partial(_nursery, timers, plan, board, gates, problems)]
    bodies += [
        partial(_forker, timers, plan, board, number, gates[1], problems)
        for number in range(FORKERS)
    ]
    children = [fork(body) for body in bodies]
    server = _server(module, plan, timers)
    server.start()
    before = _descriptors(server)
    gates[0].open()
    for pid in children:
        if os.waitpid(pid, 0)[1] != 0:
            problems.add(f"process {pid} of the storm itself failed")
        gates[1].open(FORKERS)  # nobody waits for a nursery that has failed
    _see_what_is_left(server, before, problems)


def _server(module: Any, plan: Plan, timers: Timers) -> Any:
    class OwnWayServer(module.LocalTimerServer):  # type: ignore[misc]
        """Nothing may go round what somebody wrote: this one has no watcher beside it."""

        def _reap_worker(self, worker_id: int) -> bool:
            return bool(super()._reap_worker(worker_id))

    made = module.LocalTimerServer if plan.road == NATIVE else OwnWayServer
    options: dict[str, object] = {"max_interval": _SOON}
    if module.__name__ == "hangwatch":
        options["report_dir"] = plan.folder / "reports"
    return made(timers.queue, **options)


def _forker(
    timers: Timers, plan: Plan, board: Board, number: int, gate: Gate, to: Problems
) -> None:
    gate.wait()
    share = plan.kills // FORKERS + (number < plan.kills % FORKERS)
    storm(timers, board, number, share, f"{plan.seed} {plan.road} forker {number}", to)


def _nursery(
    timers: Timers, plan: Plan, board: Board, gates: tuple[Gate, Gate], to: Problems
) -> None:
    gates[0].wait()
    timers.import_what_workers_do()
    nursery = Nursery(timers, board, f"{plan.seed} {plan.road} nursery", to)
    # Whoever does not end a hang before a storm shows nothing by one.
    nursery.begin()
    gates[1].open(FORKERS)
    nursery.run(plan.kills, plan.every)
    (plan.folder / "figures").write_text(json.dumps(asdict(nursery.figures)))


def _watchers(server: Any) -> list[int]:
    """Return keeper and watcher, if this server has any."""
    beside = getattr(server, "_beside", None)
    if beside is None:
        return []
    wait_until(lambda: watcher_below(beside.pid), "a watcher")
    watcher = watcher_below(beside.pid)
    return [beside.pid, *([watcher] if watcher else [])]


def _descriptors(server: Any) -> dict[str, int]:
    """Count what the server's process, and the watcher beside it, have open."""
    names = ("keeper", "watcher")
    found = {name: open_files(pid) for name, pid in zip(names, _watchers(server), strict=False)}
    return {"server": open_files(os.getpid()), **found}


def _descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def _see_what_is_left(server: Any, before: dict[str, int], problems: Problems) -> None:
    """See that the server is as it was before the storm, and that it stops."""
    try:
        wait_until(lambda: _descriptors(server) == before, "no descriptor is left")
    except AssertionError:
        problems.add(f"descriptors left: {before} before, {_descriptors(server)} now")
    ours = set(_watchers(server))
    try:
        wait_until(lambda: _descendants() == ours, "no process is left")
    except AssertionError:
        problems.add(f"processes left: {_describe(_descendants() - ours)}")
    began = time.monotonic()
    server.stop()
    if time.monotonic() - began > _STOPS_WITHIN:
        problems.add(f"stop() took {time.monotonic() - began:.1f} s")
    try:
        wait_until(lambda: not _descendants(), "nobody is left after stop()")
    except AssertionError:
        problems.add(f"processes left after stop(): {_describe(_descendants())}")
    sys.stderr.flush()


def _describe(pids: set[int]) -> str:
    return ", ".join(f"{pid} ({'alive' if is_alive(pid) else 'a zombie'})" for pid in pids)
