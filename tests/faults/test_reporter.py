"""A report survives the watcher that would have finished it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from hangwatch.evidence.model import Case, Scope, ScopeThread, Worker
from hangwatch.process import Identity
from hangwatch.watcher.helper import Helper
from hangwatch.watcher.reporter import Reporter
from support.nursery import LIMIT, nursery
from support.processes import is_alive
from support.watchers import wait_until


def be_a_watcher_that_dies(victim: int, directory: str, kills: bool, tell: int) -> None:
    """Start a report, tell its process id; perhaps announce the kill, and kill; then die."""
    worker = Worker(victim, 0, 0.0, {}, ["victim"], "3")
    scope = Scope("lost", 1.0, 2.0, 1.0, 1, ScopeThread(1, victim, "MainThread"), [])
    reporter = Reporter(
        lambda work, keep, outlives=False: Helper(work, keep, outlives),
        Identity(victim, 0, 0, os.pidfd_open(victim)),
        time.monotonic(),
        Case(time.time(), worker, scope),
        None,
        [],
        directory,
        lambda: False,
    )
    os.write(tell, str(reporter.helper.pid).encode())
    if kills:
        reporter.about_to_send(signal.SIGKILL, LIMIT)
        os.kill(victim, signal.SIGKILL)
    os._exit(0)


@pytest.mark.parametrize("kills", [True, False])
def test_a_watcher_that_dies_around_the_kill(tmp_path: Path, kills: bool) -> None:
    victim = nursery().fork("import time; time.sleep(1000)")
    read_end, write_end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            be_a_watcher_that_dies(victim.pid, str(tmp_path), kills, write_end)
        finally:
            os._exit(1)
    reporter = int(os.read(read_end, 100))
    os.close(read_end)
    os.close(write_end)
    _, status = os.waitpid(watcher, 0)
    assert status == 0
    if kills:
        assert victim.wait() == -signal.SIGKILL
    wait_until(lambda: not is_alive(reporter), "the reporter is done")
    if kills:
        (path,) = tmp_path.glob("[!.]*/report.json")
        report = json.loads(path.read_text())
        assert report["outcome"] == "reaped"
        assert "a watcher that has died" in report["actions"][0]["result"]
    else:
        assert victim.poll() is None
        victim.kill()
        victim.wait()
        assert not list(tmp_path.iterdir()), "a successor reports what it does itself"


def test_other_helpers_die_with_the_watcher() -> None:
    read_end, write_end = os.pipe()
    watcher = os.fork()
    if watcher == 0:

        def work() -> bytes:
            os.write(write_end, f"{os.getpid()}".encode())
            time.sleep(1000)
            return b""

        Helper(work, [write_end])
        time.sleep(1000)
    helper = int(os.read(read_end, 100))
    assert is_alive(helper)
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    wait_until(lambda: not is_alive(helper), "the helper's death")
    os.close(read_end)
    os.close(write_end)
