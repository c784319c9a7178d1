"""A watcher dies, a keeper dies, both die: who is watched stays so, and nobody is harmed."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hangwatch import SharedMemoryTimerServer
from hangwatch.watcher.reception import RESERVED_DESCRIPTORS
from support.nursery import Worker, nursery
from support.processes import is_alive, open_files
from support.raw_worker import answer, connect, hello, join, memfd, refusal
from support.watchers import RunningWatcher, StartWatcher, wait_until, watcher_below

# Holds the GIL in a C call that no signal ends, as soon as it is told to.
HUNG_IN_C = """
import ctypes, os, sys, hangwatch
r, w = os.pipe()
with hangwatch.expires(3600, "healthy"):
    print("ready", flush=True)
    sys.stdin.readline()
on_expiry = sys.argv[2] if len(sys.argv) > 2 else None
with hangwatch.expires(float(sys.argv[1]), "hung in C", on_expiry=on_expiry):
    print("in", flush=True)
    ctypes.PyDLL(None).read(r, ctypes.create_string_buffer(1), 1)
"""

# Each of its blocks ends before the one before, so each rings. At the end it prints how often it
# has connected again, and how many seconds were between two attempts, at least.
STEADY = """
import select, sys, time, hangwatch
from hangwatch.worker import connection
from hangwatch.worker.client import client_at, address_from_environment
attempts = [time.monotonic()]
connect = connection.connect
connection.connect = lambda *arguments: attempts.append(time.monotonic()) or connect(*arguments)
enough, ended, deadline = int(sys.argv[1]), [], time.monotonic() + 36000
while not ended and len(attempts) <= enough:
    ended, _, _ = select.select([0], [], [], 0.01)
    deadline -= 0.01
    with hangwatch.expires(deadline - time.monotonic(), "steady"): pass
    if "said" not in globals():
        said = True
        print("ready", flush=True)
gaps = [later - earlier for earlier, later in zip(attempts, attempts[1:])]
print(len(gaps), min(gaps, default=99), flush=True)
"""


class Mortal(RunningWatcher):
    """A watcher whose process is killed again and again, while its keeper lives on.

    Attributes:
        empty: how many files its keeper has open while no worker is connected.
    """

    empty: int

    def log(self) -> str:
        return (self.report_dir.parent / "log").read_text()


@pytest.fixture(scope="module")
def one_mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    """Start it with a low soft limit of open files, and a log of its own."""
    folder = tmp_path_factory.mktemp("mortal")
    server = SharedMemoryTimerServer(folder / "sock", report_dir=folder / "reports")
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    stderr = os.dup(2)
    with (folder / "log").open("w") as log:
        os.dup2(log.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        try:
            server.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            os.dup2(stderr, 2)
            os.close(stderr)
    mortal = Mortal(server, folder / "reports")
    mortal.empty = open_files(mortal.keeper_pid)
    yield mortal
    server.stop()


@pytest.fixture
def mortal(one_mortal: Mortal) -> Iterator[Mortal]:
    """Share it among tests, each of which leaves it working; none has it raise an exception."""
    wait_until_idle(one_mortal)
    wait_until(
        lambda: open_files(one_mortal.keeper_pid) == one_mortal.empty, "earlier workers are gone"
    )
    before = len(one_mortal.log())
    yield one_mortal
    assert "Traceback" not in one_mortal.log()[before:]


def start(watcher: RunningWatcher, script: str, *arguments: str) -> Worker:
    """Start a worker; return when it is connected and ready."""
    worker = watcher.connected_worker(
        script, *arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert worker.read_line() == "ready"
    return worker


def steady_worker(watcher: RunningWatcher) -> Worker:
    return start(watcher, STEADY, "1000000")


def has_noticed_nothing(steady: Worker) -> bool:
    """End a steady worker; tell whether it stayed connected, and had nothing to say."""
    return (*steady.communicate(), steady.returncode) == ("0 99\n", "", 0)


def hang(worker: Worker) -> None:
    """Tell a worker to hang; return when it is inside of its block."""
    worker.write_line()
    assert worker.read_line() == "in"


def wait_for_another(watcher: RunningWatcher, than: int) -> None:
    wait_until(lambda: watcher_below(watcher.keeper_pid) not in (None, than), "a successor")


def wait_until_idle(watcher: RunningWatcher) -> None:
    """Wait until a watcher has no incident any more, and has told its keeper what came of it."""
    children = Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children")
    wait_until(lambda: not children.read_text(), "its helpers have ended")
    assert answer(watcher.address, hello(), [memfd()]) is None


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop(pid: int) -> None:
    """Stop a process; return when it stands still."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", "it is stopped")


@contextlib.contextmanager
def no_watcher(watcher: RunningWatcher, how: int = signal.SIGKILL) -> Iterator[None]:
    """Have no watcher for a while: its keeper can't replace it."""
    pid = watcher.pid
    stop(watcher.keeper_pid)
    try:
        if how == signal.SIGSTOP:
            stop(pid)
        else:
            os.kill(pid, how)
            wait_until(lambda: not is_alive(pid), "the watcher's death")
        yield
    finally:
        os.kill(watcher.keeper_pid, signal.SIGCONT)
    wait_for_another(watcher, pid)


def start_patched(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, folder: Path, patch: str
) -> RunningWatcher:
    """Start a watcher in whose processes some code runs first."""
    (folder / "sitecustomize.py").write_text(patch)
    with monkeypatch.context() as patched:
        patched.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return start_watcher()


def has_stacks(report: dict[str, Any]) -> bool:
    """Tell whether the stacks are there, or a busy machine has not found the time for them."""
    missing = " ".join(report["missing"])
    return bool(report["threads"]) or "within" in missing


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_watcher_is_replaced_and_no_worker_notices(mortal: Mortal, how: signal.Signals) -> None:
    steady = steady_worker(mortal)
    hung = start(mortal, HUNG_IN_C, "0.5")
    first = mortal.pid
    hang(hung)
    os.kill(first, how)
    wait_for_another(mortal, first)
    wait_until(lambda: not is_alive(first), "it is dead")
    assert hung.wait() == -signal.SIGKILL
    report = mortal.report(pid=hung.pid)
    assert report["outcome"] == "reaped"
    assert report["scope"]["inside_s"] >= 0.5
    assert has_noticed_nothing(steady)
    hung.communicate()


def test_a_stopped_watcher_is_replaced_long_before_a_starved_one_would_be() -> None:
    """A keeper looks at one that is silent for a second; it replaces a stopped one at once."""
    script = """
import os, signal, time
from hangwatch.keep import life
watcher = life.WatcherLife(lambda link, kept: time.sleep(1000), {}, lambda: None)
assert watcher.look_at <= time.monotonic() + 1.0 < time.monotonic() + life._SILENT_FOR
os.kill(watcher.pid, signal.SIGSTOP)
os.waitid(os.P_PID, watcher.pid, os.WSTOPPED)
print(watcher.why_replace())
watcher.kill()
"""
    out, _ = nursery().fork(script).communicate()
    assert "is stopped" in out


SHOWS_SETTLING = """
import sys
from hangwatch.watcher.fair_clock import FairClock
settling = FairClock.settling
def shown(*arguments):
    seconds = settling(*arguments)
    print("settling", seconds, file=sys.stderr, flush=True)
    return seconds
FairClock.settling = shown
"""


def test_who_hung_while_nobody_watched_is_reaped_at_once(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    watcher = start_patched(start_watcher, monkeypatch, tmp_path, SHOWS_SETTLING)
    for how in (signal.SIGKILL, signal.SIGSTOP):
        worker = start(watcher, HUNG_IN_C, "0.1")
        with no_watcher(watcher, how):
            hang(worker)
            time.sleep(0.25)  # it is overdue for most of that
            assert worker.poll() is None
        assert worker.wait() == -signal.SIGKILL
        report = watcher.report(pid=worker.pid)
        assert report["scope"]["late_s"] > 0.1
        assert has_stacks(report)
        worker.communicate()
    watcher.server.stop()
    settled = re.findall(r"^settling (.*)$", capfd.readouterr().err, re.M)
    assert len(settled) >= 2
    assert set(settled) == {"0.0"}, "a pause would give it some"


def test_who_left_while_nobody_watched_is_dropped_without_a_word(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    before = open_files(watcher.keeper_pid), open_files(watcher.pid)
    steady = steady_worker(watcher)
    assert open_files(watcher.keeper_pid) == before[0] + 2, "a socket and a page are kept"
    steady.communicate()
    wait_until(
        lambda: (open_files(watcher.keeper_pid), open_files(watcher.pid)) == before,
        "nothing is left of who leaves",
    )
    worker = start(watcher, HUNG_IN_C, "0.05")
    with no_watcher(watcher):
        hang(worker)
        time.sleep(0.1)  # it is overdue now
        worker.kill()
        worker.communicate()
    wait_until(lambda: open_files(watcher.keeper_pid) == before[0], "nor of who left meanwhile")
    later = start(watcher, HUNG_IN_C, "0.05")
    hang(later)
    later.communicate()
    watcher.server.stop()
    assert [report["worker"]["pid"] for report in watcher.reports()] == [later.pid]
    log = capfd.readouterr().err
    assert log.count("died") == 1, "the successor lives"
    assert "Traceback" not in log


def test_a_program_that_an_exec_replaced_while_nobody_watched_overruns_nothing(
    mortal: Mortal,
) -> None:
    """It rang, and nobody has read that yet."""
    worker = start(
        mortal,
        "import os, sys, hangwatch\nwith hangwatch.expires(3600, 'first'): pass\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "hangwatch.expires(0.05, 'armed').__enter__()\n"
        "os.execv('/bin/sh', ['sh', '-c', 'echo in; read line'])",
    )
    with no_watcher(mortal):
        hang(worker)
        time.sleep(0.1)  # its program's block is overdue now
    later = start(mortal, HUNG_IN_C, "0.05")
    hang(later)
    later.communicate()
    mortal.report(pid=later.pid)
    wait_until_idle(mortal)
    worker.communicate("\n")
    assert (worker.returncode, mortal.reports(pid=worker.pid)) == (0, [])


def test_what_was_reported_is_not_reported_again(mortal: Mortal) -> None:
    worker = start(mortal, HUNG_IN_C, "0.05", "report")
    hang(worker)
    mortal.report(pid=worker.pid)
    for _ in range(2):
        wait_until_idle(mortal)
        first = mortal.pid
        os.kill(first, signal.SIGKILL)
        wait_for_another(mortal, first)
    later = start(mortal, HUNG_IN_C, "0.05", "report")
    hang(later)
    mortal.report(pid=later.pid)
    wait_until_idle(mortal)
    for one in (worker, later):
        one.kill()
        one.communicate()
        assert len(mortal.reports(pid=one.pid)) == 1


def test_a_newcomer_s_hello_survives_the_watcher_that_heard_it(mortal: Mortal) -> None:
    """Connect and say hello while nobody watches: the successor answers."""
    with no_watcher(mortal):
        connection = connect(mortal.address)
        socket.send_fds(connection, [hello()], [memfd()])
    with connection:
        assert refusal(connection) is None


def test_a_stopped_keeper_s_newcomers_are_told_why(mortal: Mortal) -> None:
    steady = steady_worker(mortal)
    os.kill(mortal.keeper_pid, signal.SIGSTOP)
    try:
        refused = answer(mortal.address, hello(), [memfd()])
    finally:
        os.kill(mortal.keeper_pid, signal.SIGCONT)
    assert refused is not None
    assert "keeper does not answer" in refused
    assert answer(mortal.address, hello(), [memfd()]) is None
    assert has_noticed_nothing(steady)


def test_the_pidfd_is_kept_where_the_kernel_can_t_give_it_again(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As before Linux 6.5: the socket option is one that no kernel has."""
    patch = "from hangwatch.watcher import identity\nidentity._SO_PEERPIDFD = 9999\n"
    watcher = start_patched(start_watcher, monkeypatch, tmp_path, patch)
    before = open_files(watcher.keeper_pid)
    worker = start(watcher, HUNG_IN_C, "0.05")
    assert open_files(watcher.keeper_pid) == before + 3, "socket, page and pidfd are kept"
    with no_watcher(watcher):
        hang(worker)
    assert worker.wait() == -signal.SIGKILL
    worker.communicate()
    watcher.server.stop()
    assert "overran 'hung in C'" in capfd.readouterr().err


class TestTheKeeperDies:
    def test_the_watcher_goes_on_while_workers_are_connected(
        self, start_watcher: StartWatcher
    ) -> None:
        watcher = start_watcher()
        steady = steady_worker(watcher)
        hung = start(watcher, HUNG_IN_C, "0.05")
        pid = watcher.pid
        os.kill(watcher.keeper_pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(watcher.keeper_pid), "the keeper's death")
        hang(hung)
        assert hung.wait() == -signal.SIGKILL
        late = start(watcher, HUNG_IN_C, "0.05")
        hang(late)
        assert late.wait() == -signal.SIGKILL, "newcomers are watched, too"
        assert is_alive(pid)
        assert has_noticed_nothing(steady)
        wait_until(lambda: not is_alive(pid), "the watcher ends after its last worker")
        assert not Path(watcher.address).exists()
        hung.communicate()
        late.communicate()

    def test_sigterm_then_ends_the_watcher(self, start_watcher: StartWatcher) -> None:
        watcher = start_watcher()
        pid = watcher.pid
        with join(watcher.address, memfd()):
            os.kill(pid, signal.SIGTERM)
            # While there is a keeper, it is the keeper who ends the watcher.
            for _ in range(2):
                assert answer(watcher.address, hello(), [memfd()]) is None
            os.kill(watcher.keeper_pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(watcher.keeper_pid), "the keeper's death")
            assert answer(watcher.address, hello(), [memfd()]) is None, "and it has seen that"
            assert is_alive(pid)
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "the watcher ends")

    def test_both_die_and_workers_say_so_once_and_go_on(self, start_watcher: StartWatcher) -> None:
        watcher = start_watcher()
        worker = start(watcher, STEADY, "3")
        pid = watcher.pid
        stop(pid)
        os.kill(watcher.keeper_pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        assert worker.wait() == 0
        out, err = worker.communicate()
        attempts, closest = out.split()
        assert int(attempts) == 3, "it tries to connect again"
        assert float(closest) > 0.9, "at most once a second"
        assert len(re.findall("the watcher is gone", err)) == 1
        assert len(err.splitlines()) == 2, err  # gone; and that nobody answers any more


def test_when_the_launcher_dies_both_stay_until_no_worker_is_left(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    address = str(tmp_path / "s")
    launcher = nursery().fork(
        "import sys, hangwatch, time\n"
        "s = hangwatch.SharedMemoryTimerServer(sys.argv[1], report_dir=None); s.start()\n"
        "print(s.pid, flush=True); time.sleep(1000)\n",
        address,
    )
    keeper = int(launcher.read_line())
    watcher = watcher_below(keeper)
    assert watcher is not None
    with join(address, memfd()):
        launcher.kill()
        launcher.communicate()
        for _ in range(2):  # by the second one at the latest, it has seen that
            assert answer(address, hello(), [memfd()]) is None
        assert watcher_below(keeper) == watcher
        os.kill(watcher, signal.SIGKILL)
        wait_until(lambda: watcher_below(keeper) not in (None, watcher), "a successor, even now")
        successor = watcher_below(keeper)
        assert successor is not None
        assert answer(address, hello(), [memfd()]) is None
    wait_until(lambda: not is_alive(keeper), "the keeper ends")
    assert not is_alive(successor)
    assert not (tmp_path / "s").exists()


@contextlib.contextmanager
def open_files_limited(pid: int, limit: int) -> Iterator[None]:
    """Limit how many files a process may have open, as prlimit(1) can do at any time."""
    _, hard = before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


class TestTheLimitOfOpenFiles:
    def test_the_soft_limit_is_raised_to_the_hard_one(self, mortal: Mortal) -> None:
        """The watcher was started with a soft limit of 1024."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert resource.prlimit(mortal.pid, resource.RLIMIT_NOFILE) == (hard, hard)

    @pytest.mark.parametrize("whose", ["keeper", "watcher"])
    def test_at_the_limit_newcomers_are_refused_and_nobody_is_harmed(
        self, mortal: Mortal, whose: str
    ) -> None:
        hung = start(mortal, HUNG_IN_C, "0.05")
        page = memfd()
        pid = mortal.keeper_pid if whose == "keeper" else mortal.pid
        with open_files_limited(pid, 100), contextlib.ExitStack() as stack:
            stack.callback(os.close, page)
            inside: list[socket.socket] = []
            refused = None
            while refused is None and len(inside) < 100:
                inside.append(stack.enter_context(connect(mortal.address)))
                socket.send_fds(inside[-1], [hello()], [page])
                refused = refusal(inside[-1])
            assert refused is not None
            assert "limit of 100 open files: raise it" in refused
            assert len(inside) > 5
            hang(hung)
            assert hung.wait() == -signal.SIGKILL
            assert has_stacks(mortal.report(pid=hung.pid)), "at the limit"
            for connection in inside[:-1]:
                connection.setblocking(False)
                with pytest.raises(BlockingIOError):
                    connection.recv(1)  # still connected
            for connection in inside:
                connection.close()
            wait_until(
                lambda: answer(mortal.address, hello(), [page]) is None, "there is room again"
            )
        hung.communicate()

    def test_a_crowd_that_comes_at_once_does_not_use_up_the_reserve(self, mortal: Mortal) -> None:
        """Each of them sees room when it comes; what it needs is opened later."""
        pid = mortal.pid
        limit = open_files(pid) + RESERVED_DESCRIPTORS + 20
        page = memfd()
        with open_files_limited(pid, limit), contextlib.ExitStack() as stack:
            stack.callback(os.close, page)
            # Nobody is heard before all are there.
            stop(mortal.keeper_pid)
            try:
                stop(pid)
                crowd = [stack.enter_context(connect(mortal.address)) for _ in range(50)]
                for connection in crowd:
                    socket.send_fds(connection, [hello()], [page])
            finally:
                os.kill(pid, signal.SIGCONT)
                os.kill(mortal.keeper_pid, signal.SIGCONT)
            answers = [refusal(one) for one in crowd]
            welcome = answers.count(None)
            assert 3 <= welcome < 20, answers
            refusals = {reason for reason in answers if reason is not None}
            assert all(f"its limit of {limit} open files" in reason for reason in refusals)
            assert open_files(pid) <= limit - RESERVED_DESCRIPTORS

    def test_no_descriptor_at_all_is_a_refusal(self, mortal: Mortal) -> None:
        """The limit falls to what is open, as only prlimit(1) can do, while newcomers come."""
        pid, page = mortal.pid, memfd()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, page)
            inside = [stack.enter_context(join(mortal.address, page)) for _ in range(40)]
            open_now = open_files(pid) - 6
            for connection in inside[:2]:
                connection.close()
            wait_until(lambda: open_files(pid) == open_now, "two have left")
            used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
            # Six are free below it, whatever numbers were inherited.
            limit = sorted(set(range(1000)) - used)[6]
            with open_files_limited(pid, limit):
                rooms = [6, 5, 4, 3, 2, 1]
                while rooms:
                    with contextlib.ExitStack() as opened:
                        silent = [
                            opened.enter_context(connect(mortal.address))
                            for _ in range(6 - rooms[0])
                        ]
                        newcomer = opened.enter_context(connect(mortal.address))
                        socket.send_fds(newcomer, [hello()], [page])
                        refused = refusal(newcomer)
                        # On a machine that stood still they were dismissed meanwhile: that
                        # says nothing of so much room.
                        if not select.select(silent, [], [], 0)[0]:
                            assert rooms.pop(0) >= 5 or refused is not None, rooms
                    wait_until(lambda: open_files(pid) == open_now, "nothing leaks")
            assert answer(mortal.address, hello(), [page]) is None

    def test_a_truncated_set_is_closed_and_refused(self, mortal: Mortal) -> None:
        """The keeper has room for a socket, and none for a page."""
        keeper = mortal.keeper_pid
        before = open_files(keeper)
        used = {int(name) for name in os.listdir(f"/proc/{keeper}/fd")}
        _, second, *_ = sorted(set(range(1000)) - used)
        with open_files_limited(keeper, second):
            refused = answer(mortal.address, hello(), [memfd()])
        assert refused is not None
        assert "did not all arrive" in refused
        assert open_files(keeper) == before
        assert answer(mortal.address, hello(), [memfd()]) is None


OPENS_MORE = """
import os
from hangwatch.keep.keeper import Keeper
begin = Keeper.__init__
def open_more(keeper, *arguments):
    begin(keeper, *arguments)
    keeper.more = [os.open("/dev/null", os.O_RDONLY) for _ in range(MORE)]
Keeper.__init__ = open_more
"""


@pytest.mark.parametrize(
    ("workers", "more"),
    [pytest.param(3, 1020, id="few"), pytest.param(600, 0, id="600", marks=pytest.mark.long)],
)
def test_more_workers_than_select_has_numbers(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    workers: int,
    more: int,
) -> None:
    """Of keeper, watcher and successors, each has descriptors beyond 1024.

    Either since there are so many workers, or since the keeper has more files open.
    """
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the limit of open files is too low for 600 workers")
    patch = OPENS_MORE.replace("MORE", str(more))
    watcher = start_patched(start_watcher, monkeypatch, tmp_path, patch)
    page = memfd()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, page)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        for _ in range(workers):
            stack.enter_context(join(watcher.address, page))
        for _ in range(3):
            worker = start(watcher, HUNG_IN_C, "0.05")
            hang(worker)
            assert worker.wait() == -signal.SIGKILL
            assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
            worker.communicate()
            first = watcher.pid
            for pid in (watcher.keeper_pid, first):
                assert max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) > 1024
            epolls = []
            for path in Path(f"/proc/{first}/fd").iterdir():
                with contextlib.suppress(OSError):  # a helper's pipe comes and goes
                    if "eventpoll" in os.readlink(path):
                        epolls.append(int(path.name))
            assert max(epolls) < 1024, "else it would wake later"
            os.kill(first, signal.SIGKILL)
            wait_for_another(watcher, first)


CONFUSED = """
import os, sys, time
from hangwatch import handover
from hangwatch.handover import Kind
from hangwatch.keep.keeper import Keeper
from hangwatch.keep.systemd import Notifier
def watch(successor, link, kept):
    if os.path.exists(sys.argv[1]):
        return
    open(sys.argv[1], "w").close()
    handover.send(link, handover.encode(Kind.KEEP, 7), [])
    handover.send(link, handover.encode(Kind.KEEP, 8), [os.open("/dev/null", os.O_RDONLY)])
    handover.send(link, handover.encode(Kind.DROP, 99), [])
    handover.send(link, handover.encode(Kind.NOTE, 99), [])
    link.setblocking(True)
    for number in (7, 8):
        link.recv(1, 2)  # MSG_PEEK: wait for it
        answer = handover.receive(link)
        assert (answer.kind, answer.number) == (Kind.REFUSED, number), answer
    link.send(b"?" * 9)  # of no kind that there is
    link.send(b"?")  # not even a head
    time.sleep(1000)
Keeper(watch, Notifier({})).run()
"""


def test_nothing_that_a_watcher_says_ends_the_keeper(tmp_path: Path) -> None:
    """Incomplete sets are refused; a watcher that talks nonsense is replaced."""
    keeper = nursery().fork(CONFUSED, str(tmp_path / "first"), stderr=subprocess.PIPE)
    _, err = keeper.communicate()
    assert keeper.returncode == 0, err
    assert "Traceback" not in err
    assert "did not send its socket and its page" in err
    assert "talks nonsense and is replaced" in err


# Four watchers that die before they are ready, then four that die when they are, then others.
# The keeper prints when each was started, and for how long it pauses after the death.
FAILING = """
import itertools, os, time
from hangwatch import handover
from hangwatch.keep.keeper import Keeper
from hangwatch.keep.systemd import Notifier
hear, deaths = Keeper._hear_signals, itertools.count(1)
death = next(deaths)
def pause(keeper, *seconds):
    global death
    if seconds:
        death = next(deaths)
        print(time.monotonic(), *seconds, flush=True)
    return hear(keeper, *seconds)
Keeper._hear_signals = pause
def watch(successor, link, kept):
    if 4 < death <= 8:
        handover.send(link, handover.encode(handover.Kind.READY, 0), [])
    os._exit(3)
Keeper(watch, Notifier({})).run()
"""


def test_only_a_death_before_readiness_is_followed_by_a_pause() -> None:
    keeper = nursery().fork(FAILING, stderr=subprocess.PIPE)
    lines = [keeper.read_line().split() for _ in range(10)]
    keeper.terminate()
    _, err = keeper.communicate()
    assert keeper.returncode == 0
    assert "died with status 3" in err
    times, pauses = zip(*[map(float, line) for line in lines], strict=True)
    assert pauses == (0.1, 0.2, 0.4, 0.8, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap >= pause for gap, pause in zip(gaps, pauses, strict=False))
