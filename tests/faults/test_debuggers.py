"""A worker under a debugger is reported once, and left alone while that lasts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hangwatch import failpoints
from support.nursery import LIMIT, Worker
from support.watchers import CONNECT, RunningWatcher, StartWatcher, wait_until

PDB = f"""
import sys, time, hangwatch
exec({CONNECT!r})
def look_here():
    with hangwatch.expires(1000, "debugged") as timer:
        breakpoint()
        time.sleep(float(sys.argv[1]))
look_here()
"""


def at_prompt(watcher: RunningWatcher, then: float = 0.0) -> subprocess.Popen[str]:
    """Start a worker that overruns while it is at a prompt, and takes so long after that."""
    path = watcher.report_dir.parent / "debugged.py"
    path.write_text(PDB)
    worker = watcher.interpreter(path, str(then), stdin=subprocess.PIPE)
    assert worker.stdout is not None
    while "->" not in (line := worker.stdout.readline()):
        assert line
    assert worker.stdin is not None
    print("timer.renew(0.3)", file=worker.stdin, flush=True)
    return worker


def outcomes(watcher: RunningWatcher, pid: int) -> list[str]:
    return [report["outcome"] for report in watcher.reports(pid=pid)]


def test_a_worker_at_a_prompt_is_reported_once_and_lives(watcher: RunningWatcher) -> None:
    worker = at_prompt(watcher)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert report["debugger"][1:] == "db is at work in thread MainThread", "pdb or bdb"
    assert "left alone while that lasts" in report["actions"][-1]["result"]
    # The next look at it comes before the next look at another one, which hangs by then.
    other = at_prompt(watcher, then=1000)
    watcher.report(pid=other.pid)
    other.communicate("continue\n", timeout=LIMIT)
    assert other.returncode == -9
    watcher.wait_for_reports(2, pid=other.pid)
    assert outcomes(watcher, other.pid) == ["reported", "reaped"]
    assert worker.poll() is None
    worker.communicate("continue\n", timeout=LIMIT)
    assert worker.returncode == 0
    assert outcomes(watcher, worker.pid) == ["reported"]


def test_kill_debugged(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(kill_debugged=True)
    worker = at_prompt(watcher)
    assert worker.wait(LIMIT) == -9
    worker.communicate()
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"


def traced(watcher: RunningWatcher) -> tuple[Worker, subprocess.Popen[bytes]]:
    """Start a worker that hangs as soon as it is traced, and its tracer."""
    script = """
import sys, time, hangwatch
with hangwatch.expires(1000, "traced") as timer:
    sys.stdin.readline()
    timer.renew(0.3)
    time.sleep(1000)
"""
    worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
    command = ["strace", "-q", "-p", str(worker.pid), "-o", "/dev/null"]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{worker.pid}/status")
    wait_until(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text(), "the tracer")
    worker.write_line()
    return worker, tracer


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to trace with")
def test_a_worker_that_is_traced_is_not_even_asked_for_its_stacks(watcher: RunningWatcher) -> None:
    worker, tracer = traced(watcher)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert f"process {tracer.pid} traces it" in report["debugger"]
    assert report["threads"] == []
    # The next look at it comes before the next look at another one, which is not traced by then.
    other, its_tracer = traced(watcher)
    watcher.report(pid=other.pid)
    for one, its in ((other, its_tracer), (worker, tracer)):
        assert worker.poll() is None
        its.terminate()
        its.wait()
        assert one.wait() == -9, "killed once nobody traces it"
        watcher.wait_for_reports(2, pid=one.pid)
        assert outcomes(watcher, one.pid) == ["reported", "reaped"]


def asked_at(pid: int) -> int:
    """Return when a process wrote down its stacks last."""
    (channel,) = (
        path
        for path in Path(f"/proc/{pid}/fd").iterdir()
        if "hangwatch-stacks" in os.readlink(path)
    )
    return channel.stat().st_mtime_ns


def test_a_successor_does_not_report_it_again(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    worker = at_prompt(watcher, then=1000)
    watcher.report(pid=worker.pid)
    # Until this one's report is out, the keeper has come to know of the other's.
    hang = "import time, hangwatch\nwith hangwatch.expires(0.3, 'hangs'): time.sleep(1000)"
    watcher.report(pid=watcher.connected_worker(hang).pid)
    before = watcher.pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: watcher.pid != before, "a successor")
    last_asked = asked_at(worker.pid)
    wait_until(lambda: asked_at(worker.pid) > last_asked, "a look at it")
    watcher.report(pid=watcher.connected_worker(hang).pid)
    assert worker.poll() is None
    worker.communicate("continue\n", timeout=LIMIT)
    assert worker.returncode == -9, "the successor looks again, too"
    watcher.wait_for_reports(2, pid=worker.pid)
    assert outcomes(watcher, worker.pid) == ["reported", "reaped"]


@pytest.mark.parametrize("step", ["evidence.gathering", "evidence.asking"])
def test_a_slow_machine_does_not_hide_a_debugger(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Evidence takes longer than it may where no debugger is loaded."""
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, f"{step}=sleep:2.5@1")
        watcher = start_watcher()
    worker = at_prompt(watcher)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert report["debugger"][1:] == "db is at work in thread MainThread", "pdb or bdb"
    worker.communicate("continue\n", timeout=LIMIT)
    assert worker.returncode == 0


@pytest.mark.parametrize("choice", ["on_expiry='raise'", "signal=signal.SIGUSR1, grace=1"])
@pytest.mark.parametrize("before", ["import pdb", ""], ids=["loaded before", "loaded inside"])
def test_a_worker_that_would_live_on_is_only_reported_where_a_debugger_is_loaded(
    watcher: RunningWatcher, choice: str, before: str
) -> None:
    """It isn't asked for its stacks, which would show whether the debugger is at work."""
    script = f"""
import signal, sys, time, hangwatch
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
{before}
with hangwatch.expires(1000, "soft", {choice}) as timer:
    import bdb
    timer.renew(0.3)
    sys.stdin.readline()
print("went on")
"""
    worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
    report = watcher.report(pid=worker.pid)
    out, _ = worker.communicate("\n")
    assert (worker.returncode, out) == (0, "went on\n")
    assert report["outcome"] == "reported"
    assert report["debugger"] == "bdb or pydevd is loaded, and may be at work"
    assert report["threads"] == []


def test_pydevd_is_known_by_its_files() -> None:
    from hangwatch.evidence.debuggers import in_stacks
    from hangwatch.evidence.model import Frame, ThreadStack

    def stack(*files: str) -> list[ThreadStack]:
        return [ThreadStack(1, "t", True, [Frame(file, 1, "f") for file in files], False)]

    assert in_stacks(stack("/x/debugpy/_vendored/pydevd/_pydevd_bundle/pydevd_comm.py"))
    assert in_stacks(stack("/x/job.py", f"{sys.prefix}/lib/python3/bdb.py"))
    assert in_stacks(stack("/x/my_pdb.py", "/x/pdb_tools/run.py")) is None
