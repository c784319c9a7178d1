"""What a report says when stacks are hard to have, and what asking for them never harms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hangwatch import failpoints
from support.namespaces import run_alone
from support.watchers import RunningWatcher, StartWatcher


def hang(watcher: RunningWatcher, script: str, status: int = -9) -> dict[str, Any]:
    """Run a script until it ends, and return its report."""
    worker = watcher.worker(script)
    out, _ = worker.communicate(timeout=30)
    assert worker.returncode == status, out
    return watcher.report(pid=worker.pid)


def holder(report: dict[str, Any]) -> dict[str, Any]:
    (thread,) = [thread for thread in report["threads"] if thread["holds_scope"]]
    assert isinstance(thread, dict)
    return thread


def test_150_threads_and_the_slot_s_own_is_not_left_out(watcher: RunningWatcher) -> None:
    report = hang(
        watcher,
        """
import threading, time, hangwatch
def stuck_here(): time.sleep(1000)
def work():
    with hangwatch.expires(0.8, "the first of many"): stuck_here()
threading.Thread(target=work, name="first", daemon=True).start()
for _ in range(150): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
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
    deeper(levels - 1) if levels else time.sleep(1000)
with hangwatch.expires(0.3, "too deep"): deeper(150)
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
    worker = watcher.worker(CLOSED, checkpoint)
    worker.communicate(timeout=30)
    report = watcher.report(pid=worker.pid)
    assert worker.returncode == -9
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
    report = hang(
        watcher,
        """
import signal, time, hangwatch
for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1): signal.signal(number, lambda *_: None)
with hangwatch.expires(0.3, "no channel"): time.sleep(1000)
""",
    )
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
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "evidence.asking=sleep:1.5")
        watcher = start_watcher()
    worker = watcher.worker(
        """
import os, time, hangwatch
with hangwatch.expires(0.3, "late"): time.sleep(1)
os.execvp("sleep", ["sleep", "3"])
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert watcher.report(pid=worker.pid)["outcome"] == "gone"


def test_one_report_a_block_when_only_reporting(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(on_expiry="report")
    worker = watcher.worker(
        """
import time, hangwatch
for _ in range(2):
    with hangwatch.expires(0.2, "slow"): time.sleep(4)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert [report["scope"]["entry"] for report in watcher.reports()] == [1, 2]


EXEC = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
import hangwatch
from support.watchers import RunningWatcher, wait_until

# The worker arms, forks a child that keeps its socket, and becomes another program, in
# which the signals that asked for stacks would kill.
WORKER = '''
import os, sys, time, hangwatch
block = hangwatch.expires(1.0, "before exec")
block.__enter__()
from hangwatch.worker import stack_channel
from hangwatch.worker.client import client_at
client = client_at(os.environ["HANGWATCH_ADDRESS"])
os.set_inheritable(client._socket.fileno(), True)
os.execvp("sleep", ["sleep", "1000"])
'''
with tempfile.TemporaryDirectory() as folder:
    server = hangwatch.SharedMemoryTimerServer(report_dir=folder)
    server.start()
    watcher = RunningWatcher(server, Path(folder))
    worker = watcher.worker(WORKER)
    time.sleep(3)
    assert worker.poll() is None, f"the other program was killed: {worker.returncode}"
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "gone", report["outcome"]
    assert "another program" in report["actions"][-1]["result"]
    assert not [a for a in report["actions"] if "SIG" in a["action"]]
    assert report["threads"] == []
    worker.kill()
    worker.wait()
    server.stop()
print("held")
"""


def test_a_program_that_took_the_worker_s_place_is_not_touched() -> None:
    assert "held" in run_alone(EXEC)
