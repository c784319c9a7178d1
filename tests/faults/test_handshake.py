"""What a newcomer may say to a watcher that serves others."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import mmap
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hangwatch
from hangwatch import page, wire
from hangwatch.watcher import reception
from hangwatch.worker.client import WorkerClient
from hangwatch.worker.connection import RING
from support.raw_worker import answer, connect, hello, memfd
from support.watchers import RunningWatcher, StartWatcher, wait_until

HEALTHY = """
import time, hangwatch
with hangwatch.expires(after=60, scope="healthy"):
    print("ready", flush=True)
    input()
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""


@pytest.fixture
def served(watcher: RunningWatcher) -> Iterator[RunningWatcher]:
    """A watcher with a healthy worker that must still be watched afterwards."""
    worker = watcher.worker(HEALTHY, stdin=subprocess.PIPE)
    assert worker.stdout is not None
    assert worker.stdin is not None
    worker.stdout.readline()
    yield watcher
    assert worker.poll() is None, "the healthy worker was hurt"
    worker.stdin.write("\n")
    worker.stdin.close()
    assert worker.wait(20) == -9, "and is still watched"
    worker.stdout.close()
    report = watcher.report(pid=worker.pid)
    assert report["scope"]["name"] == "at last"


def test_a_good_hello_is_welcome(served: RunningWatcher) -> None:
    assert answer(served.address, hello(), [memfd()]) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"garbage", "not one of a hangwatch worker"),
        (b"\xff" * 100, "not one of a hangwatch worker"),
        (b"[" * 10_000, "not one of a hangwatch worker"),
        (b"{}", "not one of a hangwatch worker"),
        (b'{"hangwatch": 1}', "malformed"),
        (b'{"hangwatch": 2}', "install the same version"),
        (hello(page_fd=-1), "malformed"),
        (hello(monotonic="soon"), "malformed"),
        (hello(monotonic=1e18), "another time namespace"),
        (hello(labels=["rank"]), "malformed"),
        (hello(stacks={"fd": 1}), "malformed"),
        (b"x" * (wire.MAX_BYTES + 1), "longer than"),
    ],
    ids=range(12),
)
def test_a_bad_hello_is_refused_with_the_reason(
    served: RunningWatcher, message: bytes, reason: str
) -> None:
    refused = answer(served.address, message, [memfd()])
    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize("count", [0, 2])
def test_the_descriptors_must_be_what_the_hello_says(served: RunningWatcher, count: int) -> None:
    refused = answer(served.address, hello(), [memfd() for _ in range(count)])
    assert refused is not None
    assert "descriptors" in refused


def test_a_truncated_set_of_descriptors_is_closed(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    open_before = len(os.listdir(f"/proc/{watcher.pid}/fd"))
    for _ in range(20):
        refused = answer(watcher.address, hello(), [memfd() for _ in range(9)])
        assert refused is not None
        assert "more than 2 descriptors" in refused
    wait_until(
        lambda: len(os.listdir(f"/proc/{watcher.pid}/fd")) <= open_before,
        "the watcher closes what it was sent",
    )


def huge_pages_exist() -> bool:
    return Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unsealed", "seals"),
        ("write-sealed", "seals"),
        ("short", "bytes instead of"),
        ("long", "bytes instead of"),
        ("empty", "bytes instead of"),
        ("no magic", "magic"),
        ("other layout", "layout 99"),
        ("other capacity", "slots"),
        ("a file", "no memfd"),
        ("huge", "huge pages"),
    ],
)
def test_a_page_that_is_not_safe_to_map_is_refused(
    served: RunningWatcher, tmp_path: Path, kind: str, reason: str
) -> None:
    if kind == "huge" and not huge_pages_exist():
        pytest.skip("this kernel has no huge pages")
    magic, capacity = page.MAGIC, page.CAPACITY
    descriptor = {
        "unsealed": lambda: memfd(seals=0),
        "write-sealed": lambda: memfd(seals=page.SEALS | fcntl.F_SEAL_WRITE),
        "short": lambda: memfd(size=4096),
        "long": lambda: memfd(size=page.PAGE_BYTES * 2),
        "empty": lambda: memfd(size=0, header=b""),
        "no magic": lambda: memfd(header=b"\0" * 64),
        "other layout": lambda: memfd(header=struct.pack("=8sQ", magic[:-1] + b"c", capacity)),
        "other capacity": lambda: memfd(header=struct.pack("=8sQ", magic, capacity * 2)),
        "a file": lambda: os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),
        "huge": lambda: memfd(size=1 << 21, flags=os.MFD_HUGETLB),
    }[kind]()
    refused = answer(served.address, hello(), [descriptor])
    os.close(descriptor)
    assert refused is not None
    assert reason in refused


def test_a_page_of_nonsense_harms_only_its_owner(served: RunningWatcher) -> None:
    rng = random.Random(11)
    fill = rng.randbytes(page.PAGE_BYTES - page.HEADER_BYTES)
    kinds = {
        "random": fill,
        "nan": struct.pack("=d", float("nan")) * (len(fill) // 8),
        "inf": struct.pack("=d", float("inf")) * (len(fill) // 8),
        "entry without end": struct.pack("=4d", 1.0, 0, float("inf"), float("nan")).ljust(
            page.SLOT_BYTES, b"\0"
        )
        * page.CAPACITY,
        "cycle": (struct.pack("=3d", 1e18, 0, 1) + b"\0" * 32 + struct.pack("=Qd", 1, 1.0)).ljust(
            page.SLOT_BYTES, b"\0"
        )
        * page.CAPACITY,
    }
    for content in kinds.values():
        # In a process of its own: numbers that read as overdue end whoever wrote them.
        child = os.fork()
        if child == 0:
            try:
                descriptor = memfd()
                mapping = mmap.mmap(descriptor, page.PAGE_BYTES)
                mapping[page.HEADER_BYTES :] = content[: page.PAGE_BYTES - page.HEADER_BYTES]
                mapping[24:32] = struct.pack("=d", 1e300)
                with connect(served.address) as connection:
                    socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
                    connection.recv(100)
                    for _ in range(20):
                        connection.send(RING)
                        time.sleep(0.01)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    began = time.monotonic()
    assert answer(served.address, hello(), [memfd()]) is None
    assert time.monotonic() - began < 15


def test_who_says_nothing_or_half_is_dismissed(served: RunningWatcher) -> None:
    with connect(served.address) as silent, connect(served.address) as half:
        half.send(b'{"hangwatch": 1, "page')
        assert "not one of a hangwatch worker" in str(wire.decode_reply(half.recv(4096)))
        silent.settimeout(reception.HELLO_WITHIN + 15)
        assert "no hello came in time" in str(wire.decode_reply(silent.recv(4096)))
        assert silent.recv(4096) == b""


def test_many_newcomers_at_once_are_all_served(served: RunningWatcher) -> None:
    answers: list[str | None] = []

    def newcomer() -> None:
        answers.append(answer(served.address, hello(), [memfd()]))

    threads = [threading.Thread(target=newcomer) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [None] * 100


def test_who_rings_for_ever_gets_slow_service_not_the_cpu(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE)
    assert healthy.stdout is not None
    healthy.stdout.readline()
    ticks = os.sysconf("SC_CLK_TCK")

    def cpu() -> float:
        fields = Path(f"/proc/{watcher.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    with connect(watcher.address) as connection:
        socket.send_fds(connection, [hello()], [memfd()])
        assert wire.decode_reply(connection.recv(4096)).reason is None
        connection.setblocking(False)

        def ring(until: float) -> None:
            while time.monotonic() < until and healthy.poll() is None:
                try:
                    connection.send(RING)
                except BlockingIOError:
                    time.sleep(0.0005)

        before = cpu()
        ring(time.monotonic() + 3)
        used = cpu() - before
        assert used < 1.5, f"{used} s of CPU in 3 s"
        assert healthy.poll() is None
        assert healthy.stdin is not None
        healthy.stdin.write("\n")
        healthy.stdin.flush()
        ring(time.monotonic() + 20)
        assert healthy.poll() == -signal.SIGKILL, "others are watched meanwhile"
        healthy.communicate()


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
            (b"", hangwatch.ProtocolError, "hung up"),
            (b"HTTP/1.1 400", hangwatch.ProtocolError, "not one of a hangwatch watcher"),
            (b'{"hangwatch": 7}', hangwatch.ProtocolError, "install the same version"),
            (
                wire.encode_reply(wire.Reply("full")),
                hangwatch.WatcherUnavailableError,
                "refuses .*full",
            ),
        ],
        ids=["silent", "hangs up", "no watcher", "version", "refuses"],
    )
    def test_who_answers(
        self, tmp_path: Path, reply: bytes | None, error: type[Exception], says: str
    ) -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            done = threading.Event()

            def accept() -> None:
                # Whoever is hung up on tries again for a while.
                while not done.is_set():
                    if not select.select([listener], [], [], 0.05)[0]:
                        continue
                    connection, _ = listener.accept()
                    connection.recv(wire.MAX_BYTES)
                    if reply:
                        connection.send(reply)
                    if reply is None:
                        done.wait(20)
                    connection.close()

            thread = threading.Thread(target=accept)
            thread.start()
            with pytest.raises(error, match=says):
                self.explicit(path)
            done.set()
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
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stopped:
            stopped.bind(path)
            stopped.listen()
            began = time.monotonic()
            with hangwatch.expires(60, "x"):
                first = time.monotonic() - began
            began = time.monotonic()
            for _ in range(1000):
                with hangwatch.expires(60, "x"):
                    pass
            rest = time.monotonic() - began
        assert 0.9 < first < 10
        assert rest < first
        assert "did not answer" in caplog.text

    def test_who_listens_and_never_answers_is_asked_ever_more_seldom(self, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stopped:
            stopped.bind(path)
            stopped.listen()
            client = WorkerClient(path)
            attempts: list[float] = []
            until = time.monotonic() + 12
            while time.monotonic() < until and len(attempts) < 3:
                before = time.monotonic()
                if client.try_to_connect() is not None:
                    attempts += [before]
                time.sleep(0.01)
            client.close()
        # A second each, then a pause that doubles: 1 + 2, 1 + 4.
        first, second, third = attempts
        assert third - second > 1.3 * (second - first)

    def test_a_watcher_that_comes_later_is_found(
        self, start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watcher = start_watcher()
        late = Path(watcher.address).parent / "late"
        script = (
            "import time, hangwatch\n"
            "with hangwatch.expires(60, 'early'):\n"
            "    print('armed', flush=True); input()\n"
            "while True:\n"
            "    with hangwatch.expires(0.5, 'later'): time.sleep(0.6)\n"
        )
        worker = watcher.worker(
            script,
            env={**os.environ, "HANGWATCH_ADDRESS": str(late)},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert worker.stdout is not None
        assert worker.stdin is not None
        worker.stdout.readline()
        late.symlink_to(watcher.address)
        worker.stdin.write("\n")
        worker.stdin.close()
        assert worker.wait(20) == -9
        worker.stdout.close()
        assert watcher.report(pid=worker.pid)["scope"]["name"] == "later"

    def test_a_slow_handshake_is_not_the_block_s_time(self, tmp_path: Path) -> None:
        """A watcher that answers after 0.7 s, a block that may take 0.5 s."""
        path = str(tmp_path / "s")
        script = (
            "import os, time, hangwatch\n"
            "from hangwatch.worker.client import client_at\n"
            "block = hangwatch.expires(0.5, 'short')\n"
            "block.__enter__()\n"
            "client = client_at(os.environ['HANGWATCH_ADDRESS'])\n"
            "print(client._socket is not None, client.page.words[8] - time.monotonic() > 0.2)\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            worker = subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, "HANGWATCH_ADDRESS": path},
                stdout=subprocess.PIPE,
                text=True,
            )
            connection, _ = listener.accept()
            connection.recv(wire.MAX_BYTES)
            time.sleep(0.7)
            connection.send(wire.encode_reply(wire.Reply(None)))
            out, _ = worker.communicate(timeout=30)
            connection.close()
        assert out == "True True\n"

    def test_who_arms_during_another_thread_s_handshake_is_heard(self, tmp_path: Path) -> None:
        path = str(tmp_path / "s")
        script = (
            "import threading, time, hangwatch\n"
            "def work(after, wait):\n"
            "    time.sleep(wait)\n"
            "    with hangwatch.expires(after, f'{after}'): time.sleep(1.5)\n"
            "threads = [threading.Thread(target=work, args=a) for a in ((60, 0), (5, 0.3))]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            worker = subprocess.Popen(
                [sys.executable, "-c", script], env={**os.environ, "HANGWATCH_ADDRESS": path}
            )
            connection, _ = listener.accept()
            _, descriptors, _, _ = socket.recv_fds(connection, wire.MAX_BYTES, 2)
            time.sleep(0.7)
            # As if the watcher had looked before the second thread armed.
            with mmap.mmap(descriptors[0], page.PAGE_BYTES) as memory:
                memory[16:24] = struct.pack("=d", time.monotonic() + 3600)
            connection.send(wire.encode_reply(wire.Reply(None)))
            connection.settimeout(20)
            assert connection.recv(100) == RING
            worker.wait(20)
            connection.close()
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
