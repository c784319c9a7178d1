"""The watcher dies after a signal: what was to die with the worker does, and nobody else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hangwatch import failpoints
from support.nursery import LIMIT, Worker
from support.processes import Watched, comm, is_alive, open_files
from support.raw_worker import connect, refusal
from support.watchers import RunningWatcher, StartWatcher, wait_until, watcher_below

# Asked by SIGTERM, it does what its first argument says, and then waits to be told to end; its
# child has left its session.
ASKED = """
import atexit, os, signal, subprocess, sys, time, hangwatch
how, after, grace = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
def told_to_end(): os.read(0, 1); os._exit(7)
def asked(*_):
    print("asked", flush=True)
    if how == "sys.exit": sys.exit()
    if how == "recover": raise TimeoutError
    told_to_end()
atexit.register(told_to_end)
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, start_new_session=True)
print(child.pid, flush=True)
os.read(0, 1)
try:
    with hangwatch.expires(after=after, scope="asked", grace=grace):
        print("in", flush=True)
        time.sleep(1000)
except TimeoutError:
    pass
with hangwatch.expires(after=3600, scope="healthy"):
    told_to_end()
"""


def start(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, what: str, **options: object
) -> RunningWatcher:
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, what)
        return start_watcher(**options)


def connected(
    watcher: RunningWatcher, how: str, after: float = 0.05, grace: float = LIMIT
) -> tuple[Worker, int]:
    """Start a worker that has not entered its block yet; return it and its child."""
    worker = watcher.connected_worker(ASKED, how, str(after), str(grace), stdin=subprocess.PIPE)
    return worker, int(worker.read_line())


def overrun(worker: Worker) -> None:
    """Have a worker enter its block."""
    worker.write_line()
    assert worker.read_line() == "in"


@contextlib.contextmanager
def no_successor(watcher: RunningWatcher) -> Iterator[None]:
    """Have the watcher die in here, at a failpoint, and no other one begin."""
    keeper, pid = watcher.keeper_pid, watcher.pid
    os.kill(keeper, signal.SIGSTOP)
    try:
        yield
        wait_until(lambda: not is_alive(pid), "the watcher's death")
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: watcher_below(keeper) not in (None, pid), "its successor")


def is_spared(pid: int) -> bool:
    """Tell whether a process lives, with no SIGKILL on its way to it."""
    process = Watched(pid)
    try:
        return not process.is_killed()
    finally:
        process.close()


def all_reports(watcher: RunningWatcher) -> list[int]:
    """End a watcher, which completes every report; return whom they are about."""
    watcher.server.stop()
    return [report["worker"]["pid"] for report in watcher.reports()]


def test_who_ends_in_the_grace_takes_its_descendants_along(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three times: what is killed by one rule does not count for the next.
    watcher = start(start_watcher, monkeypatch, ",".join(["ladder.sent=kill@1"] * 3))
    before = open_files(watcher.keeper_pid)
    workers = []

    def check(worker: Worker, child: int) -> None:
        assert worker.wait() == 7
        wait_until(lambda: not is_alive(child), "its child is dead")
        assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
        wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
        workers.append(worker.pid)
        worker.communicate()

    # Before there is a successor:
    worker, child = connected(watcher, "os._exit")
    with no_successor(watcher):
        overrun(worker)
        assert worker.read_line() == "asked"
        worker.write_line()
        assert worker.wait() == 7
    check(worker, child)
    # When there is one, out of its block:
    worker, child = connected(watcher, "sys.exit")
    with no_successor(watcher):
        overrun(worker)
        assert worker.read_line() == "asked"
    worker.write_line()
    check(worker, child)
    # When there is one, still inside of its block: it is asked once more.
    worker, child = connected(watcher, "os._exit")
    overrun(worker)
    assert [worker.read_line(), worker.read_line()] == ["asked", "asked"]
    worker.write_line()
    check(worker, child)
    assert all_reports(watcher) == workers, "each once"


@pytest.mark.parametrize("at", ["handover.visited=kill", "sentence.carried-out=kill"])
def test_a_successor_that_dies_before_it_has_done_it_or_just_after(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    # The worker is dead, and the successor gets as far as the next one it takes over.
    watcher = start(start_watcher, monkeypatch, f"ladder.sent=kill@1,{at}@1")
    other, orphan = connected(watcher, "recover", 3600)
    overrun(other)
    worker, child = connected(watcher, "sys.exit", grace=0)
    overrun(worker)
    try:
        assert worker.wait() == -signal.SIGKILL
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
    watcher = start(start_watcher, monkeypatch, "ladder.sent=kill@1")
    before = open_files(watcher.keeper_pid)
    worker, child = connected(watcher, "recover", grace=1)
    with no_successor(watcher):
        overrun(worker)
        assert worker.read_line() == "asked"
    try:
        # Who says nothing for two seconds is dismissed; by then the grace is over, too.
        with connect(watcher.address) as silent:
            assert "no hello came in time" in str(refusal(silent))
        worker.write_line()
        assert worker.wait() == 7
        wait_until(lambda: open_files(watcher.keeper_pid) <= before, "it is let go of")
        assert is_spared(child), "nothing was overdue any more"
    finally:
        os.kill(child, signal.SIGKILL)
    worker.communicate()


def helpers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in children if is_alive(int(one)) and comm(int(one)) == "hw-evidence"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_who_recovered_keeps_them_also_if_it_ends_while_that_is_reported(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.publishing=stop@1")
    worker, child = connected(watcher, "recover", grace=1)
    overrun(worker)
    try:
        assert worker.read_line() == "asked"
        wait_until(lambda: any(map(is_stopped, helpers_of(watcher.pid))), "it is reported")
        (reporter,) = filter(is_stopped, helpers_of(watcher.pid))
        worker.write_line()
        assert worker.wait() == 7
        os.kill(reporter, signal.SIGCONT)
        assert watcher.report(pid=worker.pid)["outcome"] == "recovered"
        assert all_reports(watcher) == [worker.pid]
        assert is_spared(child), "nothing was overdue any more"
    finally:
        os.kill(child, signal.SIGKILL)
    worker.communicate()


# When it is asked to end, its child connects, which has a child itself.
PARENT = """
import os, signal, subprocess, time, hangwatch
asks, answers = os.pipe(), os.pipe()
def asked(*_):
    os.write(asks[1], b".")
    os.read(answers[0], 1)
    os._exit(7)
child = os.fork()
if child == 0:
    below = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
    print(os.getpid(), below.pid, end=" ", flush=True)
    os.write(answers[1], b".")
    os.read(asks[0], 1)
    client = hangwatch.SharedMemoryTimerClient()
    with hangwatch.expires(after=3600, scope="healthy", client=client):
        os.write(answers[1], b".")
        time.sleep(1000)
os.read(answers[0], 1)
signal.signal(signal.SIGTERM, asked)
beside = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
print(beside.pid, flush=True)
with hangwatch.expires(after=0.05, scope="asked", grace=120): time.sleep(1000)
"""


def test_a_descendant_that_became_a_worker_keeps_its_own(watcher: RunningWatcher) -> None:
    """It connects in the grace, when its parent's descendants have been found."""
    worker = watcher.connected_worker(PARENT)
    child, below, beside = map(int, worker.read_line().split())
    try:
        assert worker.wait() == 7
        wait_until(lambda: not is_alive(beside), "who is no worker's dies")
        watcher.report(pid=worker.pid)
        assert is_spared(child)
        assert is_spared(below)
    finally:
        os.kill(child, signal.SIGKILL)
        os.kill(below, signal.SIGKILL)
        worker.communicate()


def test_a_reporter_that_is_killed_keeps_nobody_alive(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start(start_watcher, monkeypatch, "incident.reporter=stop@1")
    pid = watcher.pid
    worker, child = connected(watcher, "deaf", grace=0)
    os.kill(watcher.keeper_pid, signal.SIGSTOP)
    try:
        overrun(worker)
        wait_until(lambda: is_stopped(pid), "the watcher is about to kill it")
        # The last that was forked: the helper that gathered evidence may not be quite dead yet.
        reporter = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])
        wait_until(lambda: comm(reporter) == "hw-evidence", "it has a name, and ignores signals")
        # As a Ctrl-C does: only the worker's end ends it.
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(reporter, number)
        status = Path(f"/proc/{reporter}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM):
            assert ignored >> (number - 1) & 1
        assert is_alive(reporter)
        os.kill(reporter, signal.SIGKILL)
        wait_until(lambda: not is_alive(reporter), "the reporter's death")
    finally:
        os.kill(pid, signal.SIGCONT)
        os.kill(watcher.keeper_pid, signal.SIGCONT)
    assert worker.wait() == -signal.SIGKILL
    wait_until(lambda: not is_alive(child), "its child is dead")
    worker.communicate()
    watcher.server.stop()
    log = capfd.readouterr().err
    assert "Traceback" not in log
    assert f"worker {worker.pid} overran 'asked'" in log
    assert "could not be written" in log


def test_who_is_overdue_still_is_reported_once(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter of the watcher that died says nothing beside the successor's."""
    watcher = start(start_watcher, monkeypatch, "ladder.sent=kill@1")
    worker, _ = connected(watcher, "deaf", grace=0.5)
    overrun(worker)
    assert [worker.read_line(), worker.read_line()] == ["asked", "asked"]
    assert worker.wait() == -signal.SIGKILL
    worker.communicate()
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    assert all_reports(watcher) == [worker.pid]


def test_a_kernel_whose_sockets_forget_who_was_waited_for(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From Linux 6.5 to 6.15: the pidfd of a socket's peer, but not once it is no more."""
    # Asked for at the hello, then whether the kernel has any, then by the successor.
    faults = "ladder.sent=kill@1,kernel.peer-pidfd=fail:ENODATA@3"
    watcher = start(start_watcher, monkeypatch, faults)
    worker, child = connected(watcher, "deaf", grace=0)
    with no_successor(watcher):
        overrun(worker)
        assert worker.wait() == -signal.SIGKILL
        worker.communicate()
        assert not Path(f"/proc/{worker.pid}").exists()
    wait_until(lambda: not is_alive(child), "its child is dead")
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    watcher.server.stop()
    log = capfd.readouterr().err
    assert "Traceback" not in log
    assert "unwatched" not in log
