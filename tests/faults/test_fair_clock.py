"""Who did not run, and who is therefore late: nobody is blamed for somebody else's pause."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hangwatch.watcher.fair_clock import FairClock
from support.nursery import Worker, nursery
from support.watchers import RunningWatcher, StartWatcher, wait_until

# Enters its block when it is told to, and leaves it when it is told to.
WAITS = """
import sys, hangwatch
print("ready", flush=True)
sys.stdin.readline()
with hangwatch.expires(1, "paused with all"):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""

# Does nothing about being asked to end.
DEAF = """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("ready", flush=True)
with hangwatch.expires(0.05, "deaf", grace=1):
    while True: time.sleep(1000)
"""


def stop(*pids: int) -> None:
    """Stop processes; return when they stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        wait_until(lambda pid=pid: state_of(pid) == "T", "it is stopped")  # type: ignore[misc]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def go_on(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def sleeps_of(pid: int) -> int:
    """Count how often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[0])


def start(watcher: RunningWatcher, script: str) -> Worker:
    worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
    assert worker.read_line() == "ready"
    return worker


def sent(report: dict[str, Any], name: str) -> float | None:
    """Return when a signal was sent, in seconds from the verdict; None: it was not."""
    found = [action["at_s"] for action in report["actions"] if action["action"] == name]
    return found[0] if found else None


def blamed(log: str) -> list[str]:
    """Return for what watchers were replaced, but that they had not run for so long."""
    reasons = re.findall(r"the watcher \(process \d+\) (.*) and is replaced", log)
    silences = [re.fullmatch(r"has done nothing for (.*) s", reason) for reason in reasons]
    return [
        reason
        for reason, silence in zip(reasons, silences, strict=True)
        if silence is None or float(silence[1]) < 5
    ]


def test_a_pause_of_all_costs_the_overdue_one_settling_time(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    gets_away, hangs = start(watcher, WAITS), start(watcher, WAITS)
    keeper, pid = watcher.keeper_pid, watcher.pid
    stop(keeper, pid)
    for worker in (gets_away, hangs):
        worker.write_line()
        assert worker.read_line() == "in"
    stop(gets_away.pid, hangs.pid)
    time.sleep(2.5)  # longer than the limit, and than any watcher may be stopped
    gets_away.write_line()
    # The keeper runs first, and still finds a watcher that is stopped and says nothing.
    slept, began = sleeps_of(keeper), time.monotonic()
    go_on(keeper)
    wait_until(lambda: sleeps_of(keeper) > slept, "the keeper has looked around")
    go_on(pid)
    # Where this took long, the keeper was right to find the watcher stopped once more.
    stopped_for = time.monotonic() - began
    go_on(gets_away.pid, hangs.pid)
    out, _ = gets_away.communicate()
    assert hangs.wait() == -signal.SIGKILL
    killed = sent(watcher.report(pid=hangs.pid), "SIGKILL")
    assert killed is not None
    assert killed >= 1, "one settling time: min(pause, limit, 1 s)"
    if gets_away.returncode:  # it did not run for long after the pause, either
        killed = sent(watcher.report(pid=gets_away.pid), "SIGKILL")
        assert killed is not None
        assert killed >= 1
    else:
        assert out == "out\n"
    watcher.server.stop()
    assert blamed(capfd.readouterr().err) == [] or stopped_for > 0.7
    hangs.communicate()


def test_a_pause_of_all_does_not_count_as_grace(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    worker = start(watcher, DEAF)
    assert worker.read_line() == "asked"
    keeper, pid = watcher.keeper_pid, watcher.pid
    stop(keeper, pid, worker.pid)
    time.sleep(2.0)  # longer than the grace
    go_on(pid, worker.pid, keeper)
    assert worker.wait() == -signal.SIGKILL
    report = watcher.report(pid=worker.pid)
    killed = sent(report, "SIGKILL")
    assert killed is not None
    assert killed >= 2.8, "the pause, and a grace of 1 s, after the verdict"
    watcher.server.stop()
    assert blamed(capfd.readouterr().err) == []
    worker.communicate()


def test_a_new_watcher_blames_no_pause_for_what_is_overdue() -> None:
    """See also test_handover.py: who hung while nobody watched."""
    noticed: list[float] = []
    clock = FairClock(noticed.append)
    clock.notice()
    assert clock.settling(time.monotonic() - 5, limit=1.0) == 0
    assert noticed == []


def test_only_who_was_overdue_by_the_end_of_a_pause_may_settle() -> None:
    noticed: list[float] = []
    clock = FairClock(noticed.append)
    clock.sleeps_until(time.monotonic() - 2)
    clock.notice()
    assert noticed[0] >= 2
    paused_until = time.monotonic()
    assert clock.settling(paused_until - 1, limit=0.5) == 0.5
    assert clock.settling(paused_until - 1, limit=60) == 1.0
    assert clock.settling(paused_until + 0.1, limit=60) == 0


def test_workers_that_were_stopped_alone_are_overdue(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        "import os, signal, hangwatch\n"
        "with hangwatch.expires(0.3, 'stopped'): os.kill(os.getpid(), signal.SIGSTOP)"
    )
    assert worker.wait() == -signal.SIGKILL
    report = watcher.report(pid=worker.pid)
    assert report["process"]["state"] in ("T", "t")
    assert report["outcome"] == "reaped"
    worker.communicate()


@pytest.mark.parametrize("workers", [1, pytest.param(5, marks=pytest.mark.long)])
def test_load_does_not_defer_a_verdict_for_ever(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    """More busy processes than CPUs; nobody is replaced for being starved, either."""
    watcher = start_watcher()
    count = 4 * (os.cpu_count() or 2)
    started = [start(watcher, WAITS) for _ in range(workers)]
    busy = [nursery().fork("while True: pass") for _ in range(count)]
    try:
        for worker in started:
            worker.write_line()
            assert worker.read_line() == "in"
            assert worker.wait() == -signal.SIGKILL
            worker.communicate()
    finally:
        for one in busy:
            one.kill()
            one.wait()
    watcher.server.stop()
    assert blamed(capfd.readouterr().err) == []
    assert [report["outcome"] for report in watcher.reports()] == ["reaped"] * workers


def test_a_pause_between_a_sleep_and_a_decision_is_noticed() -> None:
    """The watcher may be stopped anywhere, also when it has just looked for a pause."""
    noticed: list[float] = []
    clock = FairClock(noticed.append)
    clock.sleeps_until(time.monotonic())
    clock.notice()
    grace = clock.wait(0.1, lambda: False)
    assert next(grace) > 0
    time.sleep(1.2)  # the pause
    assert next(grace) > time.monotonic(), "the grace goes on"
    deadline = time.monotonic()
    time.sleep(1.2)
    assert clock.settling(deadline, limit=0.5) == 0.5
    time.sleep(1.2)
    clock.sleeps_until(time.monotonic())
    assert len(noticed) == 3
