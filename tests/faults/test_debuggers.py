"""A worker under a debugger is reported once, and left alone while that lasts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest

from support.watchers import RunningWatcher, StartWatcher, wait_until

PDB = """
import hangwatch, sys, time
def look_here():
    with hangwatch.expires(0.5, "debugged"):
        breakpoint()
        time.sleep(float(sys.argv[1]))
look_here()
"""


def at_prompt(watcher: RunningWatcher, then: float = 0.0) -> subprocess.Popen[str]:
    path = watcher.report_dir.parent / "debugged.py"
    path.write_text(PDB)
    worker = watcher.interpreter(path, str(then), stdin=subprocess.PIPE)
    assert worker.stdout is not None
    while "->" not in (line := worker.stdout.readline()):
        assert line
    return worker


def test_who_is_at_a_prompt_is_reported_once_and_lives(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    worker = at_prompt(watcher)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert report["debugger"][1:] == "db is at work in thread MainThread", "pdb or bdb"
    assert "left alone while that lasts" in report["actions"][-1]["result"]
    time.sleep(5)  # some looks more
    assert worker.poll() is None
    assert len(watcher.reports()) == 1
    worker.communicate("continue\n", timeout=30)
    assert worker.returncode == 0
    watcher.server.stop()
    assert len(watcher.reports()) == 1


def test_who_hangs_after_the_prompt_is_killed_then(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    worker = at_prompt(watcher, then=1000)
    watcher.report(pid=worker.pid)
    worker.communicate("continue\n", timeout=30)
    assert worker.returncode == -9
    watcher.server.stop()
    assert [report["outcome"] for report in watcher.reports()] == ["reported", "reaped"]


def test_kill_debugged(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(kill_debugged=True)
    worker = at_prompt(watcher)
    assert worker.wait(30) == -9
    worker.communicate()
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to trace with")
def test_who_is_traced_is_not_even_asked_for_its_stacks(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    script = "import time, hangwatch\nwith hangwatch.expires(0.5, 'traced'): time.sleep(1000)"
    worker = watcher.worker(script)
    tracer = subprocess.Popen(
        ["strace", "-q", "-p", str(worker.pid), "-o", "/dev/null"], stderr=subprocess.DEVNULL
    )
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert f"process {tracer.pid} traces it" in report["debugger"]
    assert report["threads"] == []
    time.sleep(2.5)
    assert worker.poll() is None
    tracer.terminate()
    tracer.wait()
    assert worker.wait(30) == -9, "killed once nobody traces it"
    worker.communicate()
    watcher.server.stop()
    assert [report["outcome"] for report in watcher.reports()] == ["reported", "reaped"]


def test_a_successor_does_not_report_it_again(start_watcher: StartWatcher) -> None:
    import os
    import signal

    watcher = start_watcher()
    worker = at_prompt(watcher, then=1000)
    watcher.report(pid=worker.pid)
    time.sleep(0.5)  # the report is out a moment before the keeper knows of it
    before = watcher.pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: watcher.pid != before, "a successor")
    time.sleep(3)
    assert worker.poll() is None
    assert len(watcher.reports()) == 1
    worker.communicate("continue\n", timeout=30)
    assert worker.returncode == -9, "the successor looks again, too"


@pytest.mark.parametrize("choice", ["on_expiry='raise'", "signal=signal.SIGUSR1, grace=1"])
@pytest.mark.parametrize("before", ["import pdb", ""], ids=["loaded before", "loaded inside"])
def test_who_would_live_on_is_only_reported_where_a_debugger_is_loaded(
    watcher: RunningWatcher, choice: str, before: str
) -> None:
    """It isn't asked for its stacks, which would show whether the debugger is at work."""
    script = f"""
import signal, sys, time, hangwatch
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
{before}
with hangwatch.expires(0.5, "soft", {choice}):
    import bdb
    sys.stdin.readline()
print("went on")
"""
    worker = watcher.worker(script, stdin=subprocess.PIPE)
    report = watcher.report(pid=worker.pid)
    out, _ = worker.communicate("\n", timeout=30)
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
