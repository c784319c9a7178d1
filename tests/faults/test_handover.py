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
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hangwatch import wire
from hangwatch.watcher.reception import RESERVED_DESCRIPTORS
from support.processes import is_alive, open_files
from support.raw_worker import answer, connect, hello, memfd
from support.watchers import RunningWatcher, StartWatcher, wait_until, watcher_below

# Holds the GIL in a C call that no signal ends.
HUNG_IN_C = """
import ctypes, os, sys, hangwatch
from threading import Thread
r, w = os.pipe()
with hangwatch.expires(float(sys.argv[1]), "hung in C"):
    print("in", flush=True)
    ctypes.PyDLL(None).read(r, ctypes.create_string_buffer(1), 1)
"""

STEADY = """
import sys, time, hangwatch
from hangwatch.worker import connection
from hangwatch.worker.client import client_at, address_from_environment
connects = []
connect = connection.connect
connection.connect = lambda *arguments: connects.append(time.monotonic()) or connect(*arguments)
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    with hangwatch.expires(0.5, "steady"):
        time.sleep(0.01)
    if "said" not in globals():
        said = True
        print("in", flush=True)
print(len(connects), min([b - a for a, b in zip(connects, connects[1:])], default=99), flush=True)
"""


@pytest.fixture
def served(start_watcher: StartWatcher) -> RunningWatcher:
    return start_watcher()


def start(watcher: RunningWatcher, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a worker; return when it is inside of its block."""
    worker = watcher.worker(script, *arguments, stderr=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "in\n"
    return worker


def wait_for_another(watcher: RunningWatcher, than: int) -> None:
    wait_until(
        lambda: watcher_below(watcher.keeper_pid) not in (None, than), "a successor", within=40
    )


@contextlib.contextmanager
def no_watcher(watcher: RunningWatcher) -> Iterator[None]:
    """Have no watcher for a while: its keeper can't replace it."""
    pid = watcher.pid
    os.kill(watcher.keeper_pid, signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the watcher's death")
        yield
    finally:
        os.kill(watcher.keeper_pid, signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_watcher_is_replaced_and_no_worker_notices(
    served: RunningWatcher, how: signal.Signals
) -> None:
    steady = start(served, STEADY, "6")
    hung = start(served, HUNG_IN_C, "4")
    first = served.pid
    os.kill(first, how)
    wait_for_another(served, first)
    assert not is_alive(first)
    assert hung.wait(30) == -9
    assert served.report(pid=hung.pid)["outcome"] == "reaped"
    out, err = steady.communicate(timeout=30)
    assert (steady.returncode, out, err) == (0, "1 99\n", ""), "it connected once"
    hung.communicate()


def test_a_stopped_watcher_is_replaced_long_before_a_starved_one_would_be(
    served: RunningWatcher,
) -> None:
    first = served.pid
    began = time.monotonic()
    os.kill(first, signal.SIGSTOP)
    wait_for_another(served, first)
    assert time.monotonic() - began < 15


def test_who_hung_while_nobody_watched_is_reaped_at_once(served: RunningWatcher) -> None:
    killed: list[float] = []
    # A pause would give it a settling time of a second each time; a busy machine may once.
    while not killed or (killed[-1] >= 0.9 and len(killed) < 4):
        worker = start(served, HUNG_IN_C, "1.2")
        with no_watcher(served):
            time.sleep(2.5)
            assert worker.poll() is None
        assert worker.wait(30) == -9
        report = served.report(pid=worker.pid)
        assert report["scope"]["late_s"] > 1
        assert report["threads"], "with its stacks"
        killed += [step["at_s"] for step in report["actions"] if step["action"] == "SIGKILL"]
        worker.communicate()
    assert killed[-1] < 0.9, "without a settling time"


def test_a_deadline_after_the_gap_is_kept(served: RunningWatcher) -> None:
    began = time.monotonic()
    worker = start(served, HUNG_IN_C, "3")
    with no_watcher(served):
        time.sleep(0.3)
    assert worker.wait(30) == -9
    assert time.monotonic() - began >= 3
    assert 0 <= served.report(pid=worker.pid)["scope"]["late_s"] < 10
    worker.communicate()


def test_who_armed_while_nobody_watched_is_watched(served: RunningWatcher) -> None:
    worker = served.worker(
        "import sys, time, hangwatch\n"
        "with hangwatch.expires(30, 'first'): print('in', flush=True)\n"
        "sys.stdin.readline()\n"
        "with hangwatch.expires(0.2, 'second'): time.sleep(1000)\n",
        stdin=subprocess.PIPE,
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    with no_watcher(served):
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        time.sleep(0.5)
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    assert served.report(pid=worker.pid)["scope"]["name"] == "second"


def test_who_left_while_nobody_watched_is_dropped_without_a_word(served: RunningWatcher) -> None:
    before = open_files(served.keeper_pid)
    worker = start(served, HUNG_IN_C, "0.8")
    wait_until(lambda: open_files(served.keeper_pid) == before + 2, "a socket and a page are kept")
    with no_watcher(served):
        worker.kill()
        worker.communicate()
        time.sleep(1)
    first = served.pid
    wait_until(lambda: open_files(served.keeper_pid) == before, "what was kept is let go of")
    assert (served.reports(), served.pid) == ([], first)


def test_a_program_that_an_exec_replaced_while_nobody_watched_overruns_nothing(
    served: RunningWatcher,
) -> None:
    """It rang, and nobody has read that yet."""
    worker = served.worker(
        "import os, sys, time, hangwatch\nwith hangwatch.expires(9, 'first'): pass\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "hangwatch.expires(0.3, 'armed').__enter__()\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'input()'])",
        stdin=subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdout.readline()
    with no_watcher(served):
        worker.stdin.write("\n")
        worker.stdin.flush()
        time.sleep(1)
    assert served.pid, "its successor is there"
    time.sleep(0.5)
    worker.communicate("\n")
    assert (worker.returncode, served.reports()) == (0, [])


def test_who_leaves_is_let_go_of_by_the_keeper_too(served: RunningWatcher) -> None:
    before = open_files(served.keeper_pid), open_files(served.pid)
    worker = start(served, STEADY, "0.5")
    assert open_files(served.keeper_pid) == before[0] + 2
    worker.communicate()
    wait_until(
        lambda: (open_files(served.keeper_pid), open_files(served.pid)) == before, "nothing is left"
    )


def test_what_was_reported_is_not_reported_again(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(on_expiry="report")
    worker = start(watcher, HUNG_IN_C, "0.3")
    watcher.report(pid=worker.pid)
    time.sleep(0.3)
    for _ in range(2):
        first = watcher.pid
        os.kill(first, signal.SIGKILL)
        wait_for_another(watcher, first)
    other = start(watcher, HUNG_IN_C, "0.3")
    watcher.report(pid=other.pid)
    for one in (worker, other):
        one.kill()
        one.communicate()
    assert sorted(r["worker"]["pid"] for r in watcher.reports()) == sorted([worker.pid, other.pid])


def test_a_newcomer_s_hello_survives_the_watcher_that_heard_it(served: RunningWatcher) -> None:
    """Connect and say hello while nobody watches: the successor answers."""
    with no_watcher(served):
        connection = connect(served.address)
        socket.send_fds(connection, [hello()], [memfd()])
    with connection:
        assert wire.decode_reply(connection.recv(4096)).reason is None


def test_a_stopped_keeper_s_newcomers_are_told_why(served: RunningWatcher) -> None:
    steady = start(served, STEADY, "4")
    os.kill(served.keeper_pid, signal.SIGSTOP)
    try:
        refused = answer(served.address, hello(), [memfd()])
    finally:
        os.kill(served.keeper_pid, signal.SIGCONT)
    assert refused is not None
    assert "keeper does not answer" in refused
    assert answer(served.address, hello(), [memfd()]) is None
    assert steady.communicate(timeout=30) == ("1 99\n", "")


def test_the_pidfd_is_kept_where_the_kernel_can_t_give_it_again(tmp_path: Path) -> None:
    """As before Linux 6.5: the socket option is one that no kernel has."""
    tmp_path.chmod(0o700)
    script = (
        "import sys\nfrom hangwatch.watcher import identity\nidentity._SO_PEERPIDFD = 9999\n"
        "from hangwatch.cli import main\nmain()\n"
    )
    address = str(tmp_path / "s")
    serve = [sys.executable, "-c", script, "serve", "--address", address]
    keeper = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: watcher_below(keeper.pid), "the watcher")
    wait_until(Path(address).exists, "the socket")
    before = open_files(keeper.pid)
    worker = subprocess.Popen(
        [sys.executable, "-c", HUNG_IN_C, "2"],
        env={**os.environ, "HANGWATCH_ADDRESS": address},
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    wait_until(lambda: open_files(keeper.pid) == before + 3, "socket, page and pidfd are kept")
    os.kill(watcher_below(keeper.pid) or -1, signal.SIGKILL)
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    keeper.terminate()
    _, err = keeper.communicate(timeout=30)
    assert "overran 'hung in C'" in err


class TestTheKeeperDies:
    def test_the_watcher_goes_on_while_workers_are_connected(self, served: RunningWatcher) -> None:
        steady = start(served, STEADY, "4")
        hung = start(served, HUNG_IN_C, "2")
        pid = served.pid
        os.kill(served.keeper_pid, signal.SIGKILL)
        assert hung.wait(30) == -9
        late = start(served, HUNG_IN_C, "0.3")
        assert late.wait(30) == -9, "newcomers are watched, too"
        assert is_alive(pid)
        assert steady.communicate(timeout=30) == ("1 99\n", "")
        wait_until(lambda: not is_alive(pid), "the watcher ends after its last worker")
        assert not Path(served.address).exists()
        hung.communicate()
        late.communicate()

    def test_sigterm_then_ends_the_watcher(self, served: RunningWatcher) -> None:
        steady = start(served, STEADY, "30")
        pid = served.pid
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        assert is_alive(pid), "while there is a keeper, it is the keeper who ends the watcher"
        os.kill(served.keeper_pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(served.keeper_pid), "the keeper's death")
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the watcher ends")
        steady.kill()
        steady.communicate()

    def test_both_die_and_workers_say_so_once_and_go_on(self, served: RunningWatcher) -> None:
        worker = start(served, STEADY, "5")
        pid = served.pid
        os.kill(pid, signal.SIGSTOP)
        os.kill(served.keeper_pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        out, err = worker.communicate(timeout=30)
        assert worker.returncode == 0
        connects, closest = out.split()
        assert int(connects) > 2, "it tries to connect again"
        assert float(closest) > 0.9, "at most once a second"
        assert len(re.findall("the watcher is gone", err)) == 1
        assert len(err.splitlines()) == 2, err  # gone; and that nobody answers any more


def test_when_the_launcher_dies_both_stay_until_no_worker_is_left(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, hangwatch, time\n"
            "s = hangwatch.SharedMemoryTimerServer(sys.argv[1], report_dir=None); s.start()\n"
            "print(s.pid, flush=True); time.sleep(1000)\n",
            str(tmp_path / "s"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    tmp_path.chmod(0o700)
    assert launcher.stdout is not None
    keeper = int(launcher.stdout.readline())
    with connect(str(tmp_path / "s")) as connection:
        socket.send_fds(connection, [hello()], [memfd()])
        assert wire.decode_reply(connection.recv(4096)).reason is None
        launcher.kill()
        launcher.communicate()
        time.sleep(1)
        watcher = watcher_below(keeper)
        assert watcher is not None
        os.kill(watcher, signal.SIGKILL)
        wait_until(lambda: watcher_below(keeper) not in (None, watcher), "a successor, even now")
        successor = watcher_below(keeper)
        assert successor is not None
    wait_until(lambda: not is_alive(keeper), "the keeper ends")
    assert not is_alive(successor)
    assert not (tmp_path / "s").exists()


class TestTheLimitOfOpenFiles:
    def test_the_soft_limit_is_raised_to_the_hard_one(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        script = (
            "ulimit -Sn 256; ulimit -Hn 1024; "
            f"exec {sys.executable} -m hangwatch serve --address {tmp_path}/s"
        )
        keeper = subprocess.Popen(["bash", "-c", script])
        wait_until(lambda: watcher_below(keeper.pid), "the watcher")
        limits = Path(f"/proc/{watcher_below(keeper.pid)}/limits").read_text()
        keeper.terminate()
        keeper.wait()
        assert re.search(r"Max open files +1024 +1024", limits)

    @pytest.mark.parametrize("whose", ["keeper", "watcher"])
    def test_at_the_limit_newcomers_are_refused_and_nobody_is_harmed(
        self, served: RunningWatcher, whose: str
    ) -> None:
        hung = start(served, HUNG_IN_C, "6")
        pid = served.keeper_pid if whose == "keeper" else served.pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (100, 100))
        inside = []
        try:
            for _ in range(100):
                connection = connect(served.address)
                inside.append(connection)
                socket.send_fds(connection, [hello()], [memfd()])
                refused = wire.decode_reply(connection.recv(4096)).reason
                if refused is not None:
                    break
            assert refused is not None
            assert "limit of 100 open files: raise it" in refused
            assert len(inside) > 5
            assert hung.wait(30) == -9
            assert served.report(pid=hung.pid)["threads"], "with stacks, at the limit"
            for connection in inside[:-1]:
                connection.setblocking(False)
                with pytest.raises(BlockingIOError):
                    connection.recv(1)  # still connected
        finally:
            for connection in inside:
                connection.close()
        hung.communicate()
        wait_until(
            lambda: answer(served.address, hello(), [memfd()]) is None, "there is room again"
        )

    def test_a_crowd_that_comes_at_once_does_not_use_up_the_reserve(
        self, served: RunningWatcher, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Each of them sees room when it comes; what it needs is opened later."""
        limit = open_files(served.pid) + RESERVED_DESCRIPTORS + 20
        resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (limit, limit))
        page = memfd()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, page)
            crowd = [stack.enter_context(connect(served.address)) for _ in range(50)]
            for connection in crowd:
                socket.send_fds(connection, [hello()], [page])
            answers = [wire.decode_reply(one.recv(4096)).reason for one in crowd]
            welcome = answers.count(None)
            assert 3 <= welcome < 20, answers
            refusals = {reason for reason in answers if reason is not None}
            assert all(f"its limit of {limit} open files" in reason for reason in refusals)
            assert open_files(served.pid) <= limit - RESERVED_DESCRIPTORS
        assert "Traceback" not in capfd.readouterr().err

    def test_no_descriptor_at_all_is_a_refusal(
        self, served: RunningWatcher, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The limit falls to what is open, as only prlimit(1) can do, while newcomers come."""
        page = memfd()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, page)
            inside = [stack.enter_context(connect(served.address)) for _ in range(40)]
            for connection in inside:
                socket.send_fds(connection, [hello()], [page])
                assert wire.decode_reply(connection.recv(4096)).reason is None
            open_now = open_files(served.pid) - 6
            for connection in inside[:2]:
                connection.close()
            wait_until(lambda: open_files(served.pid) == open_now, "two have left")
            used = {int(name) for name in os.listdir(f"/proc/{served.pid}/fd")}
            # Six are free below it, whatever numbers were inherited.
            limit = sorted(set(range(1000)) - used)[6]
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (limit, 4096))
            rooms = [6, 5, 4, 3, 2, 1]
            while rooms:
                with contextlib.ExitStack() as opened:
                    silent = [
                        opened.enter_context(connect(served.address)) for _ in range(6 - rooms[0])
                    ]
                    newcomer = opened.enter_context(connect(served.address))
                    socket.send_fds(newcomer, [hello()], [page])
                    refused = wire.decode_reply(newcomer.recv(4096)).reason
                    # On a machine that stood still they were dismissed meanwhile: once more.
                    if not select.select(silent, [], [], 0)[0]:
                        assert rooms.pop(0) >= 5 or refused is not None, rooms
                wait_until(lambda: open_files(served.pid) == open_now, "nothing leaks")
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (4096, 4096))
            assert answer(served.address, hello(), [page]) is None
        assert "Traceback" not in capfd.readouterr().err

    def test_a_truncated_set_is_closed_and_refused(self, served: RunningWatcher) -> None:
        """The keeper has room for a socket, and none for a page."""
        before = open_files(served.keeper_pid)
        used = {int(name) for name in os.listdir(f"/proc/{served.keeper_pid}/fd")}
        _, second, *_ = sorted(set(range(1000)) - used)
        resource.prlimit(served.keeper_pid, resource.RLIMIT_NOFILE, (second, 4096))
        refused = answer(served.address, hello(), [memfd()])
        assert refused is not None
        assert "did not all arrive" in refused
        assert open_files(served.keeper_pid) == before
        resource.prlimit(served.keeper_pid, resource.RLIMIT_NOFILE, (4096, 4096))
        assert answer(served.address, hello(), [memfd()]) is None


def test_more_workers_than_select_has_numbers(served: RunningWatcher) -> None:
    """Of keeper, watcher and successors, each has descriptors beyond 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the limit of open files is too low for 600 workers")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    page = memfd()
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            connection = stack.enter_context(connect(served.address))
            socket.send_fds(connection, [hello()], [page])
            assert wire.decode_reply(connection.recv(4096)).reason is None
        for _ in range(3):
            worker = start(served, HUNG_IN_C, "0.5")
            assert worker.wait(30) == -9
            assert served.report(pid=worker.pid)["outcome"] == "reaped"
            worker.communicate()
            first = served.pid
            assert max(int(name) for name in os.listdir(f"/proc/{first}/fd")) > 1024
            epolls = []
            for path in Path(f"/proc/{first}/fd").iterdir():
                with contextlib.suppress(OSError):  # a helper's pipe comes and goes
                    if "eventpoll" in os.readlink(path):
                        epolls.append(int(path.name))
            assert max(epolls) < 1024, "else it would wake later"
            os.kill(first, signal.SIGKILL)
            wait_for_another(served, first)
    os.close(page)


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
    result = subprocess.run(
        [sys.executable, "-c", CONFUSED, str(tmp_path / "first")],
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "did not send its socket and its page" in result.stderr
    assert "talks nonsense and is replaced" in result.stderr


FAILING = """
import os, sys, time
from hangwatch.keep.keeper import Keeper
from hangwatch.keep.systemd import Notifier
def watch(successor, link, kept):
    with open(sys.argv[1], "a") as file:
        file.write(f"{time.monotonic()}\\n")
    os._exit(3)
Keeper(watch, Notifier({})).run()
"""


def test_only_a_death_before_readiness_is_followed_by_a_pause(
    served: RunningWatcher, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    keeper = subprocess.Popen(
        [sys.executable, "-c", FAILING, str(starts)], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: starts.exists() and starts.read_text().count("\n") >= 5, "five starts")
    keeper.terminate()
    _, err = keeper.communicate(timeout=30)
    assert keeper.returncode == 0
    assert "died with status 3" in err
    times = [float(line) for line in starts.read_text().split()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap >= least for gap, least in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=False))
    # As many deaths of watchers that were ready take far less than such pauses would.
    began = time.monotonic()
    for _ in range(8):
        pid = served.pid
        with connect(served.address) as connection:  # answered: it was ready
            socket.send_fds(connection, [hello()], [memfd()])
            assert wire.decode_reply(connection.recv(4096)).reason is None
        os.kill(pid, signal.SIGKILL)
        wait_for_another(served, pid)
    assert time.monotonic() - began < 10
