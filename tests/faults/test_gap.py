"""Progress without scopes: a worker that has entered no block for too long has expired."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.watchers import RunningWatcher, StartWatcher


@pytest.fixture
def watcher(start_watcher: StartWatcher) -> RunningWatcher:
    return start_watcher(gap=1.0)


def test_who_stays_outside_of_every_block_has_expired(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import time, hangwatch
def stuck_outside(): time.sleep(1000)
for _ in range(3):
    with hangwatch.expires(60, "step"): pass
    time.sleep(0.3)
stuck_outside()
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    report = watcher.report(pid=worker.pid)
    scope = report["scope"]
    assert (scope["name"], scope["limit_s"], scope["enclosing"]) == ("<gap>", 1.0, [])
    assert scope["inside_s"] >= 1.0
    assert scope["thread"]["native_id"] == worker.pid
    assert "overran '<gap>'" in report["headline"]
    first, *_ = report["threads"]
    assert (first["holds_scope"], first["frames"][0]["function"]) == (True, "stuck_outside")
    assert len(report["threads"]) == 1


HEALTHY = {
    "blocks come often enough": """
for _ in range(15):
    with hangwatch.expires(60, "step"): pass
    time.sleep(0.2)
""",
    "a long block holds a scope": """
with hangwatch.expires(60, "long"): time.sleep(3)
""",
    "a cancelled block holds one": """
with hangwatch.expires(0.5, "cancelled") as timer:
    timer.cancel(); time.sleep(3)
""",
    "a pause": """
with hangwatch.paused("pause", 60): time.sleep(3)
""",
    "another thread's blocks count": """
def work():
    for _ in range(15):
        with hangwatch.expires(60, "in a thread"): pass
        time.sleep(0.2)
thread = threading.Thread(target=work); thread.start(); thread.join()
""",
}


@pytest.mark.parametrize("body", HEALTHY.values(), ids=HEALTHY.keys())
def test_who_makes_progress_lives(watcher: RunningWatcher, body: str) -> None:
    worker = watcher.worker(f"import threading, time, hangwatch\n{body}")
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert watcher.reports() == []


def test_a_block_entered_at_the_last_moment_saves(start_watcher: StartWatcher) -> None:
    """The verdict is void as soon as the worker enters a block, whichever step comes next."""
    watcher = start_watcher(gap=0.5, grace=0.7)
    worker = watcher.worker(
        """
import signal, time, hangwatch
def back_to_work(*_):
    global timer
    timer = hangwatch.expires(60, "back at work"); timer.__enter__()
signal.signal(signal.SIGTERM, back_to_work)
with hangwatch.expires(60, "step"): pass
for _ in range(80): time.sleep(0.05)
timer.__exit__(None, None, None)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == 0, "no SIGKILL followed"
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "recovered"
    assert [action["result"] for action in report["actions"]] == ["sent", "it has entered a block"]


def test_only_reported_it_is_said_once_until_there_is_progress(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(gap=0.5, on_expiry="report")
    worker = watcher.worker(
        """
import time, hangwatch
for _ in range(2):
    with hangwatch.expires(60, "step"): pass
    time.sleep(2.5)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    watcher.server.stop()
    assert [r["scope"]["name"] for r in watcher.reports()] == ["<gap>", "<gap>"]
    assert {r["outcome"] for r in watcher.reports()} == {"reported"}


def test_on_the_command_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hangwatch", "run", "--gap", "0.5"),
            *("--report-dir", str(tmp_path), "--", sys.executable, "-c"),
            "import time, hangwatch\nwith hangwatch.expires(60): pass\ntime.sleep(1000)",
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
    worker = watcher.worker(
        """
import os, time, hangwatch
from hangwatch import page
from hangwatch.worker.client import client_at
with hangwatch.expires(60, "step"):
    time.sleep(0.5)
    client = client_at(os.environ["HANGWATCH_ADDRESS"])
    seen = {client.page.words[page.WATCH_UNTIL] - time.monotonic() > 50 for _ in range(1000)}
    print(True in seen)
""",
    )
    out, _ = worker.communicate(timeout=30)
    assert out == "True\n"
