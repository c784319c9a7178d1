"""What a newcomer may say to a watcher that serves others."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import mmap
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch import wire
from hangwatch.page import layout
from hangwatch.worker import client, connection
from hangwatch.worker.client import WorkerClient
from hangwatch.worker.connection import RING
from support.nursery import LIMIT, Worker, nursery
from support.processes import open_files
from support.raw_worker import answer, connect, hello, join, memfd, refusal
from support.watchers import RunningWatcher, wait_until

HEALTHY = """
import sys, time, hangwatch
with hangwatch.expires(after=3600, scope="healthy"):
    print("ready", flush=True)
    sys.stdin.readline()
with hangwatch.expires(after=0.05, scope="at last"):
    time.sleep(1000)
"""


@pytest.fixture
def healthy(watcher: RunningWatcher) -> Worker:
    """A worker that is connected, and hangs when it is told to."""
    worker = watcher.connected_worker(HEALTHY, stdin=subprocess.PIPE)
    assert worker.read_line() == "ready"
    return worker


@pytest.fixture
def served(watcher: RunningWatcher, healthy: Worker) -> Iterator[RunningWatcher]:
    """A watcher with a healthy worker that must still be watched afterwards."""
    yield watcher
    assert healthy.poll() is None, "the healthy worker was hurt"
    healthy.write_line()
    assert healthy.wait() == -signal.SIGKILL, "and is still watched"
    assert watcher.report(pid=healthy.pid)["scope"]["name"] == "at last"


def test_a_good_hello_is_welcome(served: RunningWatcher) -> None:
    assert answer(served.address, hello(), [memfd()]) is None


def test_a_bad_hello_is_refused_with_the_reason(served: RunningWatcher) -> None:
    descriptor = memfd()
    for message, reason in (
        (b"garbage", "not one of a hangwatch worker"),
        (b"\xff" * 100, "not one of a hangwatch worker"),
        (b"[" * 10_000, "not one of a hangwatch worker"),
        (b"{}", "not one of a hangwatch worker"),
        (b'{"hangwatch": 3}', "malformed"),
        (b'{"hangwatch": 2}', "install the same hangwatch"),
        (b'{"hangwatch": true}', "install the same hangwatch"),
        (b'{"hangwatch": [[[1]]]}', "speaks version list of"),
        (b'{"hangwatch": "\\u001b[2J"}', r"speaks version '\x1b[2J' of"),
        (hello(page_fd=-1), "malformed"),
        (hello(monotonic="soon"), "malformed"),
        (hello(monotonic=1e18), "another time namespace"),
        (hello(labels=["rank"]), "malformed"),
        (hello(stacks={"fd": 1}), "malformed"),
        (b"x" * (wire.MAX_BYTES + 1), "longer than"),
    ):
        refused = answer(served.address, message, [descriptor])
        assert refused is not None, message[:50]
        assert reason in refused, message[:50]
    os.close(descriptor)


def test_the_descriptors_must_be_what_the_hello_says(served: RunningWatcher) -> None:
    for count in (0, 2):
        refused = answer(served.address, hello(), [memfd() for _ in range(count)])
        assert refused is not None
        assert "descriptors" in refused


def test_a_truncated_set_of_descriptors_is_closed(served: RunningWatcher) -> None:
    before = open_files(served.pid)
    descriptor = memfd()
    for _ in range(20):
        refused = answer(served.address, hello(), [descriptor] * 9)
        assert refused is not None
        assert "more than 2 descriptors" in refused
    os.close(descriptor)
    wait_until(lambda: open_files(served.pid) <= before, "the watcher closes what it was sent")


def huge_pages_exist() -> bool:
    return Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists()


def test_a_page_that_is_not_safe_to_map_is_refused(served: RunningWatcher, tmp_path: Path) -> None:
    def of(*areas: layout.Area, size: int = layout.PAGE_BYTES) -> Callable[[], int]:
        return lambda: memfd(size, header=layout.header(areas, size))

    other_layout = layout.MAGIC[:-1] + b"c" + layout.header([layout.SLOTS], layout.PAGE_BYTES)[8:]
    first, row, most = layout.HEADER_BYTES, layout.SLOT_BYTES, layout.MOST_BYTES
    too_many = layout.Area("slots", first, row, 2 * layout.CAPACITY)
    kinds: dict[str, tuple[Callable[[], int], str]] = {
        "unsealed": (lambda: memfd(seals=0), "seals"),
        "write-sealed": (lambda: memfd(seals=layout.SEALS | fcntl.F_SEAL_WRITE), "seals"),
        "short": (lambda: memfd(size=4096), "bytes instead of"),
        "long": (lambda: memfd(size=layout.PAGE_BYTES * 2), "bytes instead of"),
        "empty": (lambda: memfd(size=0, header=b""), "bytes instead of"),
        "no magic": (lambda: memfd(header=b"\0" * 64), "magic"),
        "other layout": (lambda: memfd(header=other_layout), "layout 99"),
        "more slots": (of(too_many, size=too_many.end), "slots"),
        "too long": (of(layout.SLOTS, size=most + 4096), "bytes instead of"),
        "other row": (of(layout.Area("slots", first, row + 8, 9)), "328 bytes each"),
        "out of range": (of(layout.Area("slots", first, row, 4097)), "out of range"),
        "misaligned": (of(layout.Area("slots", first + 1, row, 9)), "misaligned"),
        "overlapping": (of(layout.SLOTS, layout.Area("x", 4096, 8, 9)), "overlaps"),
        "a file": (lambda: os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), "no memfd"),
    }
    for kind, (make, reason) in kinds.items():
        check_refused(served, kind, make(), reason)


@pytest.mark.skipif(not huge_pages_exist(), reason="this kernel has no huge pages")
def test_a_page_of_huge_pages_is_refused(served: RunningWatcher) -> None:
    check_refused(served, "huge", memfd(size=1 << 21, flags=os.MFD_HUGETLB), "huge pages")


def check_refused(served: RunningWatcher, kind: str, descriptor: int, reason: str) -> None:
    refused = answer(served.address, hello(), [descriptor])
    os.close(descriptor)
    assert refused is not None, kind
    assert reason in refused, kind


# Sends a page of nonsense, and rings until it was visited so often. In a process of its own:
# numbers that read as overdue end whoever wrote them.
NONSENSE = r"""
import mmap, os, random, struct, sys, time
from hangwatch.page import layout
from hangwatch.worker.connection import RING
from support.raw_worker import hello, memfd, connect, refusal
import socket
def numbers(format, *values): return struct.pack(format, *values).ljust(layout.SLOT_BYTES, b"\0")
nan, inf = float("nan"), float("inf")
content = {
    "random": lambda: random.Random(11).randbytes(layout.PAGE_BYTES),
    "nan": lambda: struct.pack("=d", nan) * (layout.PAGE_BYTES // 8),
    "inf": lambda: struct.pack("=d", inf) * (layout.PAGE_BYTES // 8),
    "entry without end": lambda: numbers("=4d", 1.0, 0, inf, nan) * layout.CAPACITY,
    "cycle": lambda: numbers("=3d32xQd", 1e18, 0, 1, 1, 1.0) * layout.CAPACITY,
}[sys.argv[1]]()
descriptor = memfd()
memory = mmap.mmap(descriptor, layout.PAGE_BYTES)
words = memoryview(memory).cast("d")
memory[layout.HEADER_BYTES :] = content[: layout.PAGE_BYTES - layout.HEADER_BYTES]
words[layout.SLOTS_IN_USE] = 1e300
connection = connect(os.environ["HANGWATCH_ADDRESS"])
socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
assert refusal(connection) is None
for _ in range(3):
    words[layout.WATCH_UNTIL] = -1.0
    connection.send(RING)
    while words[layout.WATCH_UNTIL] == -1.0: time.sleep(0.001)
"""


def test_a_page_of_nonsense_harms_only_its_owner(served: RunningWatcher) -> None:
    for kind in ("random", "nan", "inf", "entry without end", "cycle"):
        status = served.worker(NONSENSE, kind).wait()
        # Nonsense may name a first signal, whichever.
        assert status <= 0, kind
    assert answer(served.address, hello(), [memfd()]) is None


def test_who_says_nothing_or_half_is_dismissed(served: RunningWatcher) -> None:
    with connect(served.address) as silent, connect(served.address) as half:
        half.send(b'{"hangwatch": 3, "page')
        assert "not one of a hangwatch worker" in str(refusal(half))
        assert "no hello came in time" in str(refusal(silent))
        assert silent.recv(4096) == b""


def test_many_newcomers_at_once_are_all_served(served: RunningWatcher) -> None:
    answers: list[str | None] = []
    descriptor = memfd()

    def newcomer() -> None:
        answers.append(answer(served.address, hello(), [descriptor]))

    threads = [threading.Thread(target=newcomer) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert answers == [None] * 100


def test_who_rings_for_ever_gets_slow_service_not_the_cpu(
    watcher: RunningWatcher, healthy: Worker
) -> None:
    ticks = os.sysconf("SC_CLK_TCK")

    def cpu() -> float:
        fields = Path(f"/proc/{watcher.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    with join(watcher.address, memfd()) as ringing:
        ringing.setblocking(False)

        def ring() -> None:
            try:
                ringing.send(RING)
            except BlockingIOError:
                time.sleep(0.0005)

        # The median: some kernels count the time in which a machine stands still as CPU time.
        shares = []
        for _ in range(5):
            began, before = time.monotonic(), cpu()
            while time.monotonic() < began + 0.3:
                ring()
            shares.append((cpu() - before) / (time.monotonic() - began))
        assert statistics.median(shares) < 0.5, shares
        assert healthy.poll() is None
        healthy.write_line()
        while healthy.poll() is None:
            ring()
        assert healthy.wait() == -signal.SIGKILL, "others are watched meanwhile"


# A worker that waits for its watcher's answer for as long as a machine may stand still.
PATIENT = f"""
import os, sys, threading, time, hangwatch
from hangwatch.page import layout
from hangwatch.worker import connection
from hangwatch.worker.client import client_at
connection.ANSWER_WITHIN = {LIMIT}
"""


class TestAddresses:
    """A worker's side: what an address may be, and what it is told."""

    def explicit(self, address: str) -> hangwatch.SharedMemoryTimerClient:
        return hangwatch.SharedMemoryTimerClient(address)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(hangwatch.WatcherUnavailableError, match="there is no watcher at"):
            self.explicit(str(tmp_path / "none"))

    def test_no_socket(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(hangwatch.AddressError, match="is not a socket"):
            self.explicit(str(tmp_path / "file"))

    def test_too_long(self) -> None:
        with pytest.raises(hangwatch.AddressError, match="at most 107 bytes"):
            self.explicit("/" + "x" * 200)

    def test_another_kind_of_socket(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(str(tmp_path / "s"))
            other.listen()
            with pytest.raises(hangwatch.AddressError, match="no watcher's"):
                self.explicit(str(tmp_path / "s"))

    def test_a_dead_watcher(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(tmp_path / "s"))
            dead.listen()
        with pytest.raises(hangwatch.WatcherUnavailableError, match="nobody listens"):
            self.explicit(str(tmp_path / "s"))

    @pytest.mark.parametrize(
        ("reply", "error", "says"),
        [
            (None, hangwatch.WatcherUnavailableError, "did not answer within"),
            (b"", hangwatch.ProtocolError, "disconnected"),
            (b"HTTP/1.1 400", hangwatch.ProtocolError, "not one of a hangwatch watcher"),
            (b'{"hangwatch": 7}', hangwatch.VersionError, "install the same hangwatch"),
            (
                wire.encode_reply(wire.Reply("full")),
                hangwatch.WatcherUnavailableError,
                "refuses .*full",
            ),
        ],
        ids=["silent", "hangs up", "no watcher", "version", "refuses"],
    )
    def test_who_answers(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        reply: bytes | None,
        error: type[Exception],
        says: str,
    ) -> None:
        # A worker whose peer disconnects tries again for a while. By this clock that is once.
        clock, converse = [0.0], connection._converse

        def converse_for_long(*arguments: Any) -> bytes:
            answer = converse(*arguments)
            clock[0] += 0.6 * LIMIT
            return answer

        if reply is not None:
            monkeypatch.setattr(connection, "ANSWER_WITHIN", LIMIT)
            monkeypatch.setattr(connection, "monotonic", lambda: clock[0])
            monkeypatch.setattr(connection, "_converse", converse_for_long)
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()

            def accept(times: int) -> None:
                for _ in range(times):
                    with listener.accept()[0] as accepted:
                        accepted.recv(wire.MAX_BYTES)
                        if reply:
                            accepted.send(reply)

            times = {None: 0, b"": 2}.get(reply, 1)
            thread = threading.Thread(target=accept, args=[times])
            thread.start()
            with pytest.raises(error, match=says):
                self.explicit(path)
            thread.join()

    def test_the_environment_s_address_never_raises_and_warns_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("HANGWATCH_ADDRESS", str(tmp_path / "none"))
        for _ in range(100):
            with hangwatch.expires(60, "x"):
                pass
        assert len(caplog.records) == 1
        assert "there is no watcher at" in caplog.text
        assert "runs on unwatched" in caplog.text

    def test_the_first_arm_waits_about_a_second_and_later_ones_do_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = str(tmp_path / "s")
        monkeypatch.setenv("HANGWATCH_ADDRESS", path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.bind(path)
            silent.listen()
            began = time.monotonic()
            with hangwatch.expires(3600, "x"):
                first = time.monotonic() - began
            began = time.monotonic()
            for _ in range(1000):
                with hangwatch.expires(3600, "x"):
                    pass
            rest = time.monotonic() - began
            attempts = 0
            while select.select([silent], [], [], 0)[0]:
                silent.accept()[0].close()
                attempts += 1
        assert first > 0.9
        assert 1 <= attempts <= 1 + rest / 2, "the next one 2 s later, if it lasts so long"
        assert "did not answer within 1 s" in caplog.text

    def test_who_listens_and_never_answers_is_asked_ever_more_seldom(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "ANSWER_WITHIN", 0.1)
        monkeypatch.setattr(client, "_TRY_AGAIN_AFTER", 0.1)
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.bind(path)
            silent.listen()
            asking = WorkerClient(path)
            attempts: list[float] = []
            while len(attempts) < 4:
                before = time.monotonic()
                if asking.try_to_connect() is not None:
                    attempts.append(before)
                time.sleep(0.005)
            asking.close()
        gaps = [later - earlier for earlier, later in itertools.pairwise(attempts)]
        # It waits for an answer, and then pauses, each time for twice as long.
        assert all(gap >= least for gap, least in zip(gaps, (0.3, 0.5, 0.9), strict=True)), gaps

    def test_a_watcher_that_comes_later_is_found(
        self, watcher: RunningWatcher, tmp_path: Path
    ) -> None:
        late = tmp_path / "late"
        script = (
            "import os, sys, time, hangwatch\n"
            "from hangwatch.worker.client import client_at\n"
            "with hangwatch.expires(3600, 'early'):\n"
            "    print('armed', flush=True); sys.stdin.readline()\n"
            "while not client_at(os.environ['HANGWATCH_ADDRESS']).is_connected:\n"
            "    with hangwatch.expires(3600, 'early'): time.sleep(0.01)\n"
            "with hangwatch.expires(0.05, 'later'): time.sleep(1000)\n"
        )
        worker = watcher.worker(
            script,
            env={**os.environ, "HANGWATCH_ADDRESS": str(late)},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert worker.read_line() == "armed"
        late.symlink_to(watcher.address)
        worker.write_line()
        assert worker.wait() == -signal.SIGKILL
        assert watcher.report(pid=worker.pid)["scope"]["name"] == "later"

    def test_a_slow_handshake_is_not_the_block_s_time(self, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        script = (
            PATIENT + "block = hangwatch.expires(60, 'slow to begin')\n"
            "block.__enter__()\n"
            "client = client_at(os.environ['HANGWATCH_ADDRESS'])\n"
            "print(client.is_connected, client.page.words[layout.HEADER_WORDS + layout.DEADLINE])\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            worker = nursery().fork(script, env={**os.environ, "HANGWATCH_ADDRESS": path})
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(wire.MAX_BYTES)
                time.sleep(0.2)
                answered_at = time.monotonic()
                accepted.send(wire.encode_reply(wire.Reply(None)))
                out, _ = worker.communicate()
        connected, deadline = out.split()
        assert connected == "True"
        assert float(deadline) >= answered_at + 60

    def test_who_arms_during_another_thread_s_handshake_is_heard(self, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        script = (
            PATIENT + "def first():\n"
            "    with hangwatch.expires(60, 'first'): ended.wait()\n"
            "ended = threading.Event()\n"
            "thread = threading.Thread(target=first)\n"
            "thread.start()\n"
            "sys.stdin.readline()\n"
            "with hangwatch.expires(5, 'second'):\n"
            "    print('armed', flush=True)\n"
            "    sys.stdin.readline()\n"
            "ended.set()\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            worker = nursery().fork(
                script,
                env={**os.environ, "HANGWATCH_ADDRESS": path},
                stdin=subprocess.PIPE,
            )
            accepted, _ = listener.accept()
            with accepted:
                _, descriptors, _, _ = socket.recv_fds(accepted, wire.MAX_BYTES, 2)
                worker.write_line()
                assert worker.read_line() == "armed"
                # As if the watcher had looked before the second thread armed.
                with mmap.mmap(descriptors[0], layout.PAGE_BYTES) as memory:
                    memory[16:24] = struct.pack("=d", time.monotonic() + 3600)
                accepted.send(wire.encode_reply(wire.Reply(None)))
                accepted.settimeout(LIMIT)
                assert accepted.recv(100) == RING
                worker.write_line()
                worker.communicate()
            assert worker.returncode == 0
            for descriptor in descriptors:
                os.close(descriptor)

    def test_clients_that_can_t_connect_leave_nothing_open(self, tmp_path: Path) -> None:
        def open_count() -> int:
            gc.collect()
            return len(os.listdir("/proc/self/fd"))

        with contextlib.suppress(hangwatch.HangwatchError):
            self.explicit(str(tmp_path / "none"))
        before = open_count()
        for _ in range(20):
            with contextlib.suppress(hangwatch.HangwatchError):
                self.explicit(str(tmp_path / "none"))
        assert open_count() == before
