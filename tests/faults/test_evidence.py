"""What a report says when stacks are hard to have, and what asking for them never harms."""

from __future__ import annotations

import subprocess
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from hangwatch import failpoints
from support.namespaces import run_alone
from support.nursery import LIMIT
from support.watchers import CONNECT, RunningWatcher, StartWatcher


def hang(watcher: RunningWatcher, script: str, status: int = -9) -> dict[str, Any]:
    """Run a script until it ends, and return its report."""
    worker = watcher.connected_worker(script)
    assert worker.wait() == status
    return watcher.report(pid=worker.pid)


def holder(report: dict[str, Any]) -> dict[str, Any]:
    (thread,) = [thread for thread in report["threads"] if thread["holds_scope"]]
    assert isinstance(thread, dict)
    return thread


def test_150_threads_and_the_slot_s_own_is_not_left_out(watcher: RunningWatcher) -> None:
    report = hang(
        watcher,
        """
import queue, threading, time, hangwatch
def stuck_here(): time.sleep(1000)
def work():
    with hangwatch.expires(1000, "the first of many") as timer: begin.put(timer); stuck_here()
begin = queue.Queue()
threading.Thread(target=work, name="first", daemon=True).start()
timer = begin.get()
for _ in range(150): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
timer.renew(0.3)
time.sleep(1000)
""",
    )
    # faulthandler shows the newest 100 threads; the one that hangs is among the oldest.
    assert len(report["threads"]) == 101
    assert report["threads"][0] == holder(report)
    assert holder(report)["name"] == "first"
    assert "stuck_here" in [frame["function"] for frame in holder(report)["frames"]]
    assert any("stops at 100; 152 kernel threads" in reason for reason in report["missing"])
    assert len(report["process"]["tasks"]) == 152


def test_a_stack_of_more_than_100_frames_says_that_it_is_cut(watcher: RunningWatcher) -> None:
    report = hang(
        watcher,
        """
import time, hangwatch
def deeper(levels):
    if levels: deeper(levels - 1)
    timer.renew(0.3)
    time.sleep(1000)
with hangwatch.expires(1000, "too deep") as timer: deeper(150)
""",
    )
    assert holder(report)["cut"]
    assert len(holder(report)["frames"]) == 100
    assert any("stops at 100" in reason for reason in report["missing"])


CLOSED = """
import os, sys, time, hangwatch
from hangwatch.worker import stack_channel
from hangwatch.worker.client import client_at
with hangwatch.expires(30, "connect"): pass
fd = stack_channel.open_channel().fd
os.close(fd)
if sys.argv[1:]:
    checkpoint = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    os.dup2(checkpoint, fd)
    os.write(fd, b"precious")
with hangwatch.expires(0.3, "closed"): time.sleep(1000)
"""


def test_a_reused_descriptor_is_never_written_to(watcher: RunningWatcher, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    worker = watcher.connected_worker(CLOSED, checkpoint)
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    assert report["threads"] == []
    assert any("is another file now" in reason for reason in report["missing"])
    assert checkpoint.read_bytes() == b"precious"


def test_a_closed_descriptor_is_said(watcher: RunningWatcher) -> None:
    report = hang(watcher, CLOSED)
    assert any("can't be opened" in reason for reason in report["missing"])


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("lambda *_: None", "another handler has it"),
        ("signal.SIG_DFL", "no longer catches"),
        ("signal.SIG_IGN", "no longer catches"),
    ],
)
def test_a_replaced_signal_handler_is_no_harm(
    watcher: RunningWatcher, handler: str, says: str
) -> None:
    report = hang(
        watcher,
        f"""
import os, signal, time, hangwatch
from hangwatch.worker import stack_channel
from hangwatch.worker.client import client_at
with hangwatch.expires(30, "connect"): pass
channel = stack_channel.open_channel()
for number in (channel.own, channel.all): signal.signal(number, {handler})
with hangwatch.expires(0.3, "replaced"): time.sleep(1000)
""",
    )
    assert report["outcome"] == "reaped"
    assert report["threads"] == []
    assert any(says in reason for reason in report["missing"]), report["missing"]


def test_a_worker_without_a_stack_channel_still_gets_a_report(watcher: RunningWatcher) -> None:
    take_all_signals = """
import signal
for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1): signal.signal(number, lambda *_: None)
"""
    hangs = """
import time, hangwatch
with hangwatch.expires(0.3, "no channel"): time.sleep(1000)
"""
    worker = watcher.worker(take_all_signals + CONNECT + hangs)
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reaped"
    assert report["missing"][0] == "Python stacks: the worker has no stack channel"
    assert report["process"]["state"] == "S"


def test_the_process_is_described(watcher: RunningWatcher) -> None:
    report = hang(
        watcher,
        """
import subprocess, time, hangwatch
subprocess.Popen(["sleep", "1000"])
with hangwatch.expires(30, "around"), hangwatch.expires(0.3, "inner"):
    sum(range(10**15))
""",
    )
    process = report["process"]
    assert process["state"] == "R"
    assert process["cpu_gained_s"] >= 0
    assert process["cpu_s"] > 0
    assert [child["command"] for child in process["children"]] == [["sleep", "1000"]]
    assert report["scope"]["enclosing"] == ["around"]
    assert report["worker"]["command"][1] == "-c"
    assert not any("environ" in key for key in report)


def test_who_becomes_another_program_when_it_is_asked_lives(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block ends, and exec resets the handlers, between the last look and the request."""
    events: Queue[str] = Queue()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "evidence.asking=sleep:1.5")
        watcher = start_watcher(on_event=lambda event: events.put(event["event"]))
    worker = watcher.connected_worker(
        """
import os, signal, time, hangwatch
# What it ignores, the other program does, too: it lives even if it was very slow.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with hangwatch.expires(0.3, "late", grace=20): os.read(0, 1); time.sleep(0.5)
os.execvp("cat", ["cat"])
""",
        stdin=subprocess.PIPE,
    )
    while events.get(timeout=LIMIT) != "expired":
        pass
    worker.write_line()
    assert watcher.report(pid=worker.pid)["outcome"] == "gone"
    assert worker.communicate("lives")[0] == "lives"
    assert worker.returncode == 0


def test_one_report_a_block_when_only_reporting(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(on_expiry="report")
    worker = watcher.connected_worker(
        """
import sys, hangwatch
for _ in range(3):
    with hangwatch.expires(0.2, "slow"): sys.stdin.readline()
""",
        stdin=subprocess.PIPE,
    )
    for count in (1, 2, 3):
        watcher.wait_for_reports(count, pid=worker.pid)
        worker.write_line()
    worker.communicate()
    assert worker.returncode == 0
    entries = [report["scope"]["entry"] for report in watcher.reports(pid=worker.pid)]
    assert entries == [1, 2, 3]


EXEC = """
import tempfile
from pathlib import Path
import hangwatch
from support.watchers import RunningWatcher

# The worker arms and becomes another program, which has its socket, and in which the signals
# that ask for stacks would kill.
WORKER = '''
import os, sys, time, hangwatch
block = hangwatch.expires(1000, "before exec")
block.__enter__()
from hangwatch.worker import stack_channel
from hangwatch.worker.client import client_at
client = client_at(os.environ["HANGWATCH_ADDRESS"])
os.set_inheritable(client._socket.fileno(), True)
block.renew(0.5)
os.execvp("sleep", ["sleep", "1000"])
'''
HANGS = '''
import time, hangwatch
with hangwatch.expires(0.3, "hangs"): time.sleep(1000)
'''
with tempfile.TemporaryDirectory() as folder:
    server = hangwatch.SharedMemoryTimerServer(report_dir=folder)
    server.start()
    watcher = RunningWatcher(server, Path(folder))
    worker = watcher.connected_worker(WORKER)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "gone", report["outcome"]
    assert "another program" in report["actions"][-1]["result"]
    assert not [a for a in report["actions"] if "SIG" in a["action"]]
    assert report["threads"] == []
    # Whatever else was to come has come by now.
    later = watcher.connected_worker(HANGS)
    assert later.wait() == -9
    assert watcher.report(pid=later.pid)["outcome"] == "reaped"
    assert worker.poll() is None, f"the other program was killed: {worker.returncode}"
    worker.kill()
    worker.wait()
    server.stop()
print("held")
"""


def test_a_program_that_took_the_worker_s_place_is_not_touched() -> None:
    assert "held" in run_alone(EXEC)
