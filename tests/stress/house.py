"""The server's process in a kill storm, and what must be left of everything in the end."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from hangwatch import linux
from stress.driver import NATIVE, Driver, Plan
from stress.workers import Timers
from support.history import own_log
from support.processes import Gate, fork, is_alive, open_files
from support.watchers import wait_until, watcher_below

_SOON = 0.1


def keep_house(module: Any, plan: Plan) -> None:
    """Be the server's process of one storm."""
    stderr = os.open(plan.folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(stderr, 2)
    linux.become_subreaper()  # whatever is left behind comes to us
    log = own_log(plan.folder / "house.log")

    def complain(what: str) -> None:
        log.write("problem", scope=what)

    (plan.folder / "logs").mkdir()
    timers = Timers(module, multiprocessing.get_context("fork").Queue(), plan.folder / "logs")
    gate = Gate()
    gc.freeze()

    def drive() -> None:
        gate.wait()
        Driver(timers, plan).run()

    # Before the server has threads: whoever forks all the time has none.
    driver = fork(drive)
    server = _server(module, plan, timers)
    server.start()
    before = _descriptors(server)
    gate.open()
    if os.waitpid(driver, 0)[1] != 0:
        complain("the driver failed")
    _see_what_is_left(server, before, plan, complain)
    log.write("end")


def _server(module: Any, plan: Plan, timers: Timers) -> Any:
    class OwnWayServer(module.LocalTimerServer):  # type: ignore[misc]
        """Nothing may go round what somebody wrote: this one has no companion watcher."""

        def _reap_worker(self, worker_id: int) -> bool:
            return bool(super()._reap_worker(worker_id))

    made = module.LocalTimerServer if plan.road == NATIVE else OwnWayServer
    options: dict[str, object] = {"max_interval": _SOON}
    if "report_dir" in inspect.signature(module.LocalTimerServer).parameters:
        options["report_dir"] = plan.folder / "reports"
    return made(timers.queue, **options)


def _watchers(server: Any) -> list[int]:
    """Return keeper and watcher, if this server has any."""
    companion = getattr(server, "_companion", None)
    if companion is None:
        return []
    wait_until(lambda: watcher_below(companion.pid), "a watcher")
    watcher = watcher_below(companion.pid)
    return [companion.pid, *([watcher] if watcher else [])]


def _descriptors(server: Any) -> dict[str, int]:
    """Count what the server's process, and its companion watcher, have open."""
    names = ("keeper", "watcher")
    found = {name: open_files(pid) for name, pid in zip(names, _watchers(server), strict=False)}
    return {"server": open_files(os.getpid()), **found}


def _see_what_is_left(
    server: Any, before: dict[str, int], plan: Plan, complain: Callable[[str], None]
) -> None:
    """See that the server is as it was before the storm, and that it stops."""

    def is_so(condition: Callable[[], bool]) -> bool:
        try:
            wait_until(condition, "nothing is left", plan.patience + 10)
        except AssertionError:
            return False
        return True

    def left(besides: set[int]) -> str:
        pids = {process.pid for process in psutil.Process().children(recursive=True)} - besides
        return ", ".join(f"{pid} ({'alive' if is_alive(pid) else 'a zombie'})" for pid in pids)

    if not is_so(lambda: _descriptors(server) == before):
        complain(f"descriptors left: {before} before, {_descriptors(server)} now")
    ours = set(_watchers(server))
    if not is_so(lambda: not left(ours)):
        complain(f"processes left: {left(ours)}")
    began = time.monotonic()
    server.stop()
    if time.monotonic() - began > plan.patience:
        complain(f"stop() took {time.monotonic() - began:.1f} s")
    if not is_so(lambda: not left(set())):
        complain(f"processes left after stop(): {left(set())}")
