"""Progress without scopes: a worker that has entered no block for too long has expired."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest

from hangwatch.watcher.watched import Watched
from support.nursery import Worker
from support.watchers import CONNECT, RunningWatcher, StartWatcher, first_recovered

# It connects while it is in a block, so that no time counts before it is connected.
FIRST = f"""
import hangwatch
with hangwatch.expires(1000, "first"):
    exec({CONNECT!r})
"""
STANDS_STILL = "import time; time.sleep(1000)"


@pytest.fixture
def watcher(watcher_with: StartWatcher) -> RunningWatcher:
    return watcher_with(gap=0.5)


def start(watcher: RunningWatcher, script: str, **options: Any) -> Worker:
    return watcher.worker(FIRST + script, **options)


def test_a_worker_that_stays_outside_of_every_block_has_expired(watcher: RunningWatcher) -> None:
    worker = start(
        watcher,
        """
import time
def stuck_outside(): time.sleep(1000)
for _ in range(3):
    with hangwatch.expires(1000, "step"): pass
stuck_outside()
""",
    )
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    scope = report["scope"]
    assert (scope["name"], scope["limit_s"], scope["enclosing"]) == ("<gap>", 0.5, [])
    assert scope["inside_s"] >= 0.5
    assert scope["thread"]["native_id"] == worker.pid
    assert "overran '<gap>'" in report["headline"]
    first, *_ = report["threads"]
    assert (first["holds_scope"], first["frames"][0]["function"]) == (True, "stuck_outside")
    assert len(report["threads"]) == 1


HEALTHY = {
    "block after block": """
print(flush=True)
while not select.select([0], [], [], 0)[0]:
    with hangwatch.expires(1000, "step"): time.sleep(0.1)
""",
    "a long block": """
with hangwatch.expires(1000, "long"): print(flush=True); sys.stdin.readline()
""",
    "a cancelled block": """
with hangwatch.expires(1000, "cancelled") as timer:
    timer.cancel()
    print(flush=True); sys.stdin.readline()
""",
    "a pause": """
with hangwatch.paused("pause", 1000): print(flush=True); sys.stdin.readline()
""",
    "another thread's blocks": """
def work():
    while thread.is_alive():
        with hangwatch.expires(1000, "in a thread"): entered.set(); time.sleep(0.1)
entered = threading.Event()
thread = threading.Thread(target=work, daemon=True); thread.start()
entered.wait()
print(flush=True); sys.stdin.readline()
""",
}


def test_a_worker_that_makes_progress_lives(watcher: RunningWatcher) -> None:
    workers = {
        name: start(
            watcher, f"import select, sys, threading, time\n{script}", stdin=subprocess.PIPE
        )
        for name, script in HEALTHY.items()
    }
    for worker in workers.values():
        worker.read_line()
    # A whole gap later, and one more.
    for _ in range(2):
        assert start(watcher, STANDS_STILL).wait() == -9
    for name, worker in workers.items():
        worker.communicate("end\n")
        assert worker.returncode == 0, name
        assert watcher.reports(pid=worker.pid) == [], name


def test_each_block_that_is_entered_begins_the_gap_anew() -> None:
    worker = Watched.__new__(Watched)  # the decision needs no more of it
    worker.standing_since, worker.entries = inf, [7.0]
    looks = [
        (1.0, False, False),  # outside: the gap begins
        (1.9, False, False),
        (1.95, True, False),  # it was in a block meanwhile
        (2.9, False, False),
        (2.93, False, True),  # it is in a block
        (5.0, False, True),
        (5.1, False, False),
        (6.0, False, False),
    ]
    for now, moved, inside in looks:
        assert worker.stands_still(now, moved, inside, 1.0) is None, now
    found = worker.stands_still(6.2, False, False, 1.0)
    assert found is not None
    assert (found.since, found.entries) == (5.1, (7.0,))


def test_a_block_entered_at_the_last_moment_saves(watcher_with: StartWatcher) -> None:
    """The verdict is void as soon as the worker enters a block, whichever step comes next."""
    watcher = watcher_with(gap=0.5, grace=1.0)
    script = """
import signal, sys
def back_to_work(*_):
    global timer
    timer = hangwatch.expires(1000, "back at work"); timer.__enter__()
signal.signal(signal.SIGTERM, back_to_work)
with hangwatch.expires(1000, "step"): pass
sys.stdin.readline()
timer.__exit__(None, None, None)
"""
    worker, report = first_recovered(watcher, lambda: start(watcher, script, stdin=subprocess.PIPE))
    worker.communicate("end\n")
    assert worker.returncode == 0, "no SIGKILL followed"
    assert [action["result"] for action in report["actions"]] == ["sent", "it has entered a block"]


def test_only_reported_it_is_said_once_until_there_is_progress(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(gap=0.5, on_expiry="report")
    script = """
import sys
for _ in range(2):
    with hangwatch.expires(1000, "step"): pass
    sys.stdin.readline()
"""
    worker = start(watcher, script, stdin=subprocess.PIPE)
    for count in (1, 2):
        watcher.wait_for_reports(count, pid=worker.pid)
        other = start(watcher, STANDS_STILL)
        watcher.report(pid=other.pid)  # a whole gap later
        other.kill()
        assert len(watcher.reports(pid=worker.pid)) == count
        worker.write_line()
    assert worker.wait() == 0
    reports = watcher.reports(pid=worker.pid)
    assert [report["scope"]["name"] for report in reports] == ["<gap>", "<gap>"]
    assert {report["outcome"] for report in reports} == {"reported"}


def test_on_the_command_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hangwatch", "run", "--gap", "0.5"),
            *("--report-dir", str(tmp_path), "--", sys.executable, "-c", FIRST + STANDS_STILL),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 128 + 9
    (path,) = tmp_path.glob("*/report.json")
    assert json.loads(path.read_text())["scope"]["name"] == "<gap>"


def test_it_costs_the_worker_no_ring(watcher: RunningWatcher) -> None:
    """Looks for the gap promise the worker nothing new: see its page's watch_until."""
    worker = start(
        watcher,
        """
import os, time
from hangwatch.page import layout
from hangwatch.worker.client import client_at
client = client_at(os.environ["HANGWATCH_ADDRESS"])
with hangwatch.expires(10_000, "step"):
    time.sleep(0.2)  # some looks
    while client.page.words[layout.WATCH_UNTIL] - time.monotonic() < 5000: time.sleep(0.001)
""",
    )
    assert worker.wait() == 0
