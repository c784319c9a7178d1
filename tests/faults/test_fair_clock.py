"""Who did not run, and who is therefore late: nobody is blamed for somebody else's pause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from support.processes import is_alive
from support.watchers import RunningWatcher, StartWatcher

# Leaves its block when it is told to.
WAITS = """
import sys, time, hangwatch
with hangwatch.expires(2, "paused with all"):
    print("in", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""


# Asked to end, it does so after a second's work, and says how.
TIDIES_UP = """
import os, signal, time, hangwatch
def asked(*_):
    print("asked", flush=True)
    for _ in range(100): time.sleep(0.01)
    os._exit(7)
signal.signal(signal.SIGTERM, asked)
with hangwatch.expires(0.3, "tidies up", grace=3):
    print("in", flush=True)
    time.sleep(1000)
"""


def stop(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def go_on(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def start(watcher: RunningWatcher, script: str) -> subprocess.Popen[str]:
    worker = watcher.worker(script, stdin=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "in\n"
    return worker


def test_a_pause_of_all_costs_the_overdue_one_settling_time(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    gets_away = start(watcher, WAITS)
    hangs = start(watcher, WAITS)
    pid = watcher.pid
    everybody = watcher.keeper_pid, pid, gets_away.pid, hangs.pid
    stop(*everybody)
    time.sleep(4)  # longer than the limit, and than any watcher may be silent
    assert gets_away.stdin is not None
    gets_away.stdin.write("leave\n")
    gets_away.stdin.flush()
    # The keeper may run first, and still finds a watcher that is stopped and says nothing.
    go_on(watcher.keeper_pid)
    time.sleep(0.2)
    go_on(gets_away.pid, hangs.pid, pid)
    out, _ = gets_away.communicate(timeout=30)
    assert (gets_away.returncode, out) == (0, "out\n")
    assert hangs.wait(30) == -9
    (killed,) = [
        action["at_s"]
        for action in watcher.report(pid=hangs.pid)["actions"]
        if action["action"] == "SIGKILL"
    ]
    assert killed >= 1, "one settling time: min(pause, limit, 1 s)"
    assert watcher.pid == pid, "and the watcher is not blamed either"
    hangs.communicate()


def test_a_pause_of_all_does_not_count_as_grace(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    worker = start(watcher, TIDIES_UP)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "asked\n"
    pid = watcher.pid
    stop(watcher.keeper_pid, pid, worker.pid)
    time.sleep(4)
    go_on(pid)
    time.sleep(0.2)  # in which it would kill
    go_on(worker.pid, watcher.keeper_pid)
    worker.communicate(timeout=30)
    assert worker.returncode == 7
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    assert watcher.pid == pid


def test_a_pause_of_the_watcher_alone_extends_nothing(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    killed: list[float] = []
    # A settling time would be a second each time; a busy machine may cost as much once.
    while not killed or (killed[-1] >= 0.9 and len(killed) < 4):
        with start(watcher, WAITS) as worker:
            pid = watcher.pid
            time.sleep(1)
            stop(pid)
            assert worker.wait(30) == -9
            assert not is_alive(pid), "it was replaced"
            killed += [
                action["at_s"]
                for action in watcher.report(pid=worker.pid)["actions"]
                if action["action"] == "SIGKILL"
            ]
    assert killed[-1] < 0.9, "without a settling time"


def test_workers_that_were_stopped_alone_are_overdue(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    worker = start(watcher, WAITS)
    stop(worker.pid)
    assert worker.wait(30) == -9
    report = watcher.report(pid=worker.pid)
    assert report["process"]["state"] in ("T", "t")
    assert report["outcome"] == "reaped"
    worker.communicate()


def test_load_does_not_defer_a_verdict_for_ever(start_watcher: StartWatcher) -> None:
    """More busy processes than CPUs; nobody is replaced for being starved, either."""
    watcher = start_watcher()
    pid = watcher.pid
    count = 4 * (os.cpu_count() or 2)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        for _ in range(3):
            worker = start(watcher, WAITS)
            assert worker.wait(40) == -9
            worker.communicate()
        assert watcher.pid == pid
    finally:
        for one in busy:
            one.kill()
            one.wait()
    assert [report["outcome"] for report in watcher.reports()] == ["reaped"] * 3
