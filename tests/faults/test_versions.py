"""A worker and a watcher of different versions: refused in words, and nobody is harmed."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hangwatch
from hangwatch import wire
from hangwatch.keep import address
from hangwatch.page.layout import WHAT_TO_DO
from hangwatch.timer import _place
from hangwatch.watcher.refusals import EVERY, Refusals
from hangwatch.worker import client, connection
from hangwatch.worker.client import WorkerClient
from support import version_0_1
from support.nursery import LIMIT
from support.raw_worker import connect, hello, memfd, refusal
from support.watchers import RunningWatcher, wait_until

TESTS = str(Path(__file__).parents[1])


@contextmanager
def watcher_of_0_1(path: Path) -> Iterator[list[bytes]]:
    """Answer at `path` as a watcher of 0.1.0 does; yields the hellos that it hears."""
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    message, descriptors, _, _ = socket.recv_fds(connection, wire.MAX_BYTES, 2)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    if not message:
                        return
                    heard.append(message)
                    assert json.loads(message)["hangwatch"] != 1
                    connection.send(version_0_1.REFUSAL)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield heard
        finally:
            with connect(str(path)):
                pass
            thread.join()


def test_a_worker_of_0_1_can_read_why_it_is_refused(watcher: RunningWatcher) -> None:
    descriptor = version_0_1.page()
    with connect(watcher.address) as old:
        socket.send_fds(old, [version_0_1.hello()], [descriptor])
        why = version_0_1.why_refused(old.recv(wire.MAX_BYTES))
    assert why == (
        "the worker speaks version 1 of hangwatch's protocol, its watcher version 3: "
        "install the same hangwatch in both environments"
    )
    # Its page alone is refused as well, in words that say what to do.
    with connect(watcher.address) as raw:
        socket.send_fds(raw, [hello()], [descriptor])
        assert refusal(raw) == f"the page has layout 2, this watcher reads 3: {WHAT_TO_DO}"
    os.close(descriptor)


def test_a_worker_of_a_later_version_is_answered_with_ours(watcher: RunningWatcher) -> None:
    descriptor = memfd()
    with connect(watcher.address) as later:
        socket.send_fds(later, [hello(hangwatch=wire.VERSION + 1)], [descriptor])
        answer = json.loads(later.recv(wire.MAX_BYTES))
    os.close(descriptor)
    assert (answer["hangwatch"], answer["welcome"]) == (wire.VERSION, False)
    assert f"the worker speaks version {wire.VERSION + 1}" in answer["reason"]
    assert WHAT_TO_DO in answer["reason"]


MANY_OF_0_1 = """
import os, socket
from support import version_0_1
from support.raw_worker import connect
descriptor = version_0_1.page()
for _ in range(1000):
    with connect(os.environ["HANGWATCH_ADDRESS"]) as old:
        socket.send_fds(old, [version_0_1.hello()], [descriptor])
        assert "install the same hangwatch" in version_0_1.why_refused(old.recv(16384))
"""


def test_the_launcher_says_it_once_however_many_workers_come() -> None:
    result = subprocess.run(
        [*(sys.executable, "-m", "hangwatch", "run"), "--", sys.executable, "-c", MANY_OF_0_1],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": TESTS},
    )
    assert result.returncode == 0, result.stderr
    first, *rest = [line for line in result.stderr.splitlines() if "speaks version 1" in line]
    assert "WARNING: refused process " in first
    assert WHAT_TO_DO in first
    # More often only if a thousand of them took a minute.
    assert len(rest) < 10, result.stderr
    assert sum(int(line.split(" times more")[0].split()[-1]) for line in rest) == 999


def test_a_refusal_is_logged_once_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for second in range(3):
        refusals.note(7, "too old", float(second))
        refusals.note(7, "too new", float(second))
        refusals.tick(float(second))
    assert caplog.messages == ["refused process 7: too old", "refused process 7: too new"]
    caplog.clear()
    refusals.note(8, "too old", EVERY - 1)
    refusals.tick(EVERY)
    assert caplog.messages == ["refused 3 times more: too old", "refused 2 times more: too new"]
    caplog.clear()
    refusals.note(9, "too old", EVERY + 1)
    refusals.tick(2 * EVERY)
    refusals.tick(3 * EVERY)
    assert caplog.messages == ["refused 1 times more: too old"]
    caplog.clear()
    refusals.note(9, "too old", 3 * EVERY)
    assert caplog.messages == ["refused process 9: too old"]


def test_reasons_that_somebody_makes_up_take_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for number in range(1000):
        refusals.note(7, f"reason {number}", 0.0)
    assert len(caplog.messages) == 1000
    assert len(refusals._counted) == 100


class TestWatcherOf01:
    """A worker of this version, and a watcher of 0.1.0."""

    def test_the_caller_is_told_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "ANSWER_WITHIN", LIMIT)
        path = tmp_path / "s"
        with watcher_of_0_1(path), pytest.raises(hangwatch.VersionError) as raised:
            hangwatch.SharedMemoryTimerClient(str(path))
        assert str(raised.value) == (
            f"the watcher at {path} speaks version 1 of hangwatch's protocol, "
            "this process version 3: install the same hangwatch in both environments"
        )
        assert (raised.value.theirs, raised.value.ours) == ("1", 3)
        assert isinstance(raised.value, hangwatch.ProtocolError)

    def test_a_worker_warns_once_and_runs_on_unwatched(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(connection, "ANSWER_WITHIN", LIMIT)
        monkeypatch.setattr(client, "_TRY_AGAIN_AFTER", 0.0)  # each arm tries again
        path = tmp_path / "s"
        monkeypatch.setenv("HANGWATCH_ADDRESS", str(path))
        with watcher_of_0_1(path) as heard:
            for _ in range(20):
                with hangwatch.expires(60, "x"):
                    pass
        assert len(heard) > 1
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "speaks version 1" in record.getMessage()
        assert WHAT_TO_DO in record.getMessage()
        assert record.getMessage().endswith("; this process runs on unwatched")

    def test_it_is_asked_ever_more_seldom(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "ANSWER_WITHIN", 2 * LIMIT)
        clock = [1000.0]
        monkeypatch.setattr(client, "monotonic", lambda: clock[0])
        path = tmp_path / "s"
        with watcher_of_0_1(path) as heard:
            asking = WorkerClient(str(path))
            tries = []
            for second in range(400):
                clock[0] = 1000.0 + second
                if asking.try_to_connect() is not None:
                    tries.append(second)
            asking.close()
        assert tries == [0, 2, 6, 14, 30, 62, 122, 182, 242, 302, 362]
        assert len(heard) == len(tries)


class TestAddresses:
    """A default address has the version in it."""

    def test_each_version_has_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert Path(address.default_address()).name == "v3-watcher.sock"
        assert Path(address.default_address(shared=True)).name == "v3-watcher.sock"
        for shared in (False, True):
            name = Path(address.private_address(shared)).name
            assert name.startswith(f"v3-{os.getpid()}-")
        with tempfile.TemporaryFile() as fifo:
            assert Path(_place.link_of(os.fstat(fifo.fileno()))).name.startswith("v3-pair-")

    def test_another_version_s_sockets_are_left_alone(self) -> None:
        with tempfile.TemporaryDirectory(prefix="hw-") as name:
            folder = Path(name) / "hangwatch"
            folder.mkdir(mode=0o700)
            names = ["watcher.sock", "v2-watcher.sock"]
            for old in names:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
                    dead.bind(str(folder / old))
                    dead.listen()
            serve = subprocess.Popen(
                [sys.executable, "-m", "hangwatch", "serve"],
                env={**os.environ, "XDG_RUNTIME_DIR": name},
            )
            try:
                wait_until((folder / "v3-watcher.sock").exists, "the socket")
            finally:
                serve.terminate()
                serve.wait()
            assert sorted(path.name for path in folder.iterdir()) == sorted(names)

    def test_another_version_s_pairs_are_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_place, "known_folder", lambda: str(tmp_path))
        names = ["pair-1-2", "v2-pair-1-2", "v3-pair-1-2"]
        for name in names:
            (tmp_path / name).symlink_to("/nowhere")
        _place.sweep()
        assert sorted(path.name for path in tmp_path.iterdir()) == names[:2]
