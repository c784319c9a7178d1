"""The watcher dies after a signal: what was to die with the worker does, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from hangwatch import failpoints
from support.processes import is_alive, open_files
from support.watchers import RunningWatcher, StartWatcher, wait_until

# Asked by SIGTERM, it does what its argument says; its child has left its session.
ASKED = """
import os, signal, subprocess, sys, time, hangwatch
def asked(*_):
    if sys.argv[1] != "recover":
        time.sleep(float(sys.argv[2]))
        sys.exit(7) if sys.argv[1] == "sys.exit" else os._exit(7)
    raise TimeoutError
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
try:
    with hangwatch.expires(after=0.3, scope="asked"):
        time.sleep(1000)
except TimeoutError:
    pass
end = time.monotonic() + 4
while time.monotonic() < end:
    with hangwatch.expires(after=60, scope="healthy"):
        time.sleep(0.01)
os._exit(7)
"""


# Its child connects, and has one itself, only when the parent was asked to end.
PARENT = """
import signal, subprocess, sys, time, hangwatch
def asked(*_): child.stdin.write("go on\\n")
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
)
beside = subprocess.Popen(["sleep", "1000"])
print(child.pid, child.stdout.readline().strip(), beside.pid, flush=True)
with hangwatch.expires(after=0.5, scope="deaf"):
    while True: time.sleep(0.1)
"""
CHILD = """
import subprocess, sys, hangwatch
below = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
print(below.pid, flush=True)
sys.stdin.readline()
with hangwatch.expires(after=600, scope="healthy"): sys.stdin.read(); below.wait()
"""


def start(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, what: str, **options: object
) -> RunningWatcher:
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, what)
        return start_watcher(**options)


def asked(watcher: RunningWatcher, *how: str) -> tuple[subprocess.Popen[str], int]:
    worker = watcher.worker(ASKED, *how)
    assert worker.stdout is not None
    return worker, int(worker.stdout.readline())


@pytest.mark.parametrize("after", ["0.01", "0.3"])
@pytest.mark.parametrize("how", ["sys.exit", "os._exit"])
def test_who_ends_in_the_grace_takes_its_descendants_along(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, how: str, after: str
) -> None:
    watcher = start(start_watcher, monkeypatch, "ladder.sent=kill@1", grace=2)
    before = open_files(watcher.keeper_pid)
    worker, child = asked(watcher, how, after)
    assert worker.wait(20) == 7
    worker.communicate()
    wait_until(lambda: not is_alive(child), "its child is dead")
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
    time.sleep(0.3)
    assert len(watcher.reports()) == 1


@pytest.mark.parametrize("at", ["handover.visited=kill", "sentence.carried-out=kill"])
def test_a_successor_that_dies_before_it_has_done_it_or_just_after(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    # The worker is dead, and the successor gets as far as the next one it takes over.
    watcher = start(start_watcher, monkeypatch, f"ladder.sent=kill@1,{at}@1")
    worker, child = asked(watcher, "sys.exit", "0")
    other = watcher.worker(ASKED.replace("after=0.3", "after=60"), "recover")
    assert other.stdout is not None
    orphan = int(other.stdout.readline())
    try:
        assert worker.wait(20) == -signal.SIGKILL
        wait_until(lambda: not is_alive(child), "its child is dead")
        assert other.poll() is None
    finally:
        for process in (worker, other):
            process.kill()
            process.communicate()
        os.kill(orphan, signal.SIGKILL)


def test_who_recovered_keeps_its_descendants_when_it_ends_later(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "ladder.sent=kill@1", grace=1)
    worker, child = asked(watcher, "recover")
    try:
        assert worker.wait(20) == 7
        worker.communicate()
        time.sleep(1)
        assert is_alive(child), "nothing was overdue any more"
    finally:
        os.kill(child, signal.SIGKILL)


def test_who_recovered_keeps_them_also_if_it_ends_while_that_is_reported(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.publishing=sleep:6", grace=1)
    worker, child = asked(watcher, "recover")
    try:
        assert worker.wait(20) == 7
        worker.communicate()
        assert watcher.report(pid=worker.pid)["outcome"] == "recovered"
        assert is_alive(child), "nothing was overdue any more"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_descendant_that_became_a_worker_keeps_its_own(start_watcher: StartWatcher) -> None:
    """It connects in the grace, when its parent's descendants have been found."""
    watcher = start_watcher(grace=3)
    worker = watcher.worker(PARENT, CHILD)
    assert worker.stdout is not None
    child, below, beside = map(int, worker.stdout.readline().split())
    try:
        assert worker.wait(20) == -signal.SIGKILL
        wait_until(lambda: not is_alive(beside), "who is no worker's dies")
        watcher.report(pid=worker.pid)
        assert is_alive(child)
        assert is_alive(below)
    finally:
        os.kill(child, signal.SIGKILL)
        os.kill(below, signal.SIGKILL)
        worker.communicate()


def test_a_reporter_that_is_killed_keeps_nobody_alive(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher(grace=2)
    worker = watcher.worker(
        "import signal, time, hangwatch\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "with hangwatch.expires(after=0.3, scope='deaf'):\n    while True: time.sleep(0.1)",
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "asked\n"
    helpers = psutil.Process(watcher.pid).children
    wait_until(lambda: len(helpers()) == 1, "the others have been waited for")
    reporter = helpers()[0].pid
    os.kill(reporter, signal.SIGINT)  # as a Ctrl-C does: only the worker's end ends it
    os.kill(reporter, signal.SIGTERM)
    time.sleep(0.2)
    assert is_alive(reporter)
    os.kill(reporter, signal.SIGKILL)
    assert worker.wait(20) == -signal.SIGKILL
    worker.communicate()
    watcher.server.stop()
    log = capfd.readouterr().err
    assert "Traceback" not in log
    assert f"worker {worker.pid} overran 'deaf'" in log
    assert "could not be written" in log


def test_who_is_overdue_still_is_reported_once(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter of the watcher that died says nothing beside the successor's."""
    watcher = start(start_watcher, monkeypatch, "ladder.sent=kill@1", grace=2)
    worker = watcher.worker(
        "import signal, time, hangwatch\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with hangwatch.expires(after=0.3, scope='deaf'):\n    while True: time.sleep(0.1)",
    )
    assert worker.wait(20) == -signal.SIGKILL
    worker.communicate()
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    time.sleep(1)
    assert len(watcher.reports()) == 1


def test_a_kernel_whose_sockets_forget_who_was_waited_for(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From Linux 6.5 to 6.15: the pidfd of a socket's peer, but not once it is no more."""
    # Asked for at the hello, then whether the kernel has any, then by the successor.
    faults = "ladder.sent=kill@1,handover.forked=sleep:1.5@2,kernel.peer-pidfd=fail:ENODATA@3"
    watcher = start(start_watcher, monkeypatch, faults)
    worker, child = asked(watcher, "sys.exit", "0")
    assert worker.wait(20) == -signal.SIGKILL
    worker.communicate()
    assert not Path(f"/proc/{worker.pid}").exists()
    wait_until(lambda: not is_alive(child), "its child is dead")
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    watcher.server.stop()
    log = capfd.readouterr().err
    assert "Traceback" not in log
    assert "unwatched" not in log
