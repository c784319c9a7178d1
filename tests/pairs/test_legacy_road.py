"""What the legacy road must not do: end the healthy, or miss who hangs."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hangwatch import FileTimerClient, FileTimerServer, LocalTimerClient, LocalTimerServer, expires
from hangwatch.timer._targets import Targets
from hangwatch.timer.api import TimerRequest
from hangwatch.timer.file_based_local_timer import FileTimerRequest
from support.nursery import LIMIT, nursery
from support.watchers import wait_until

_CONTEXT = mp.get_context("fork")


class LegacyFileServer(FileTimerServer):
    """A server that keeps its own way: no watcher stands beside it."""

    def _reap_worker(self, worker_pid: int, signal: int = signal.SIGKILL) -> bool:
        return super()._reap_worker(worker_pid, signal)


class LegacyLocalServer(LocalTimerServer):
    """The same, over a queue."""

    def _reap_worker(self, worker_id: int) -> bool:
        return super()._reap_worker(worker_id)


class Unreadable:
    """What its receiver can't unpickle."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)


def _hang_after_a_soft_limit(path: str) -> None:
    soft, hard = FileTimerClient(path, signal=0), FileTimerClient(path)
    with expires(0.5, "hard", client=hard), expires(0.2, "soft", client=soft):
        time.sleep(1000)


def test_a_timer_that_never_kills_leaves_the_worker_s_others_armed(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        if request is not None:
            told.append((name, request.scope_id))

    server = LegacyFileServer(str(tmp_path / "fifo"), max_interval=0.1, log_event=log_event)
    server.start()
    try:
        worker = _CONTEXT.Process(target=_hang_after_a_soft_limit, args=(str(tmp_path / "fifo"),))
        worker.start()
        worker.join(LIMIT)
        assert worker.exitcode == -signal.SIGKILL
        wait_until(lambda: len(told) == 3, "three events")
        assert told == [
            ("timer expired", "soft"),
            ("timer expired", "hard"),
            ("kill worker process", "hard"),
        ]
    finally:
        server.stop()


def test_a_number_that_was_refused_once_may_be_a_worker_s_later() -> None:
    targets = Targets(set, LocalTimerServer(_CONTEXT.Queue())._complaints)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        # As after the end of a short worker whose number the next one has got.
        targets._refused.add(child.pid)
        assert targets.note(child.pid) is False, "whoever had the number before has no timers now"
        assert not targets.is_refused(child.pid)
        assert targets.reap(child.pid, signal.SIGKILL)
        assert child.wait(LIMIT) == -signal.SIGKILL
    finally:
        child.kill()
        child.communicate()
        targets.close()


def test_who_was_refused_and_has_no_timers_is_forgotten() -> None:
    server = LegacyLocalServer(_CONTEXT.Queue())
    server.register_timers([TimerRequest(1, "forged", time.time() + 600)])
    server.register_timers([TimerRequest(1, "forged", -1)])
    assert server._targets.is_refused(1)
    server.clear_timers(set())
    assert not server._targets.is_refused(1)


def test_a_writer_that_never_stops_holds_up_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    queue = LegacyFileServer(path)._fifo
    queue.open()
    line = FileTimerRequest(os.getpid(), "flood", -1).to_json() + "\n"
    flood = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            f"import os\nfd = os.open({path!r}, os.O_WRONLY)\n"
            f"while True: os.write(fd, {line * 20!r}.encode())",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(queue.size, "the flood")
        for _ in range(50):
            before = queue.lines_read
            time.sleep(0.005)
            queue.size()
            # A pipe holds 64 KiB; the last read may bring as many again.
            assert queue.lines_read - before <= 2 * 65536 // len(line) + 1
    finally:
        flood.kill()
        flood.wait()
        queue.close()


def test_a_child_of_a_server_does_not_keep_its_fifo_alive(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    code = """
import os, sys, hangwatch
server = hangwatch.FileTimerServer(sys.argv[1], report_dir=None)
server.start()
if os.fork() == 0:
    print("ready", flush=True)
sys.stdin.read()
"""
    with nursery().fork(code, path, stdin=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        first.kill()
        first.wait()
        with pytest.raises(BrokenPipeError):
            FileTimerClient(path)._send_request(FileTimerRequest(os.getpid(), "x", -1))
        server = LegacyFileServer(path)
        server.start()
        server.stop()


def _put_unreadable(queue: mp.Queue[object]) -> None:
    for _ in range(20):
        queue.put(Unreadable())


def _hang(queue: mp.Queue[object]) -> None:
    with expires(0.2, "hang", client=LocalTimerClient(queue)):
        time.sleep(1000)


def test_what_can_t_be_unpickled_is_dropped_alone() -> None:
    queue: mp.Queue[object] = _CONTEXT.Queue()
    server = LegacyLocalServer(queue, max_interval=0.1)
    server.start()
    try:
        for work in _put_unreadable, _hang:
            worker = _CONTEXT.Process(target=work, args=(queue,))
            worker.start()
            worker.join(LIMIT)
        assert worker.exitcode == -signal.SIGKILL
    finally:
        server.stop()
    assert server._watchdog_thread is None
    assert threading.active_count() < 10


def test_a_queue_that_fails_ends_nobody_s_protection() -> None:
    queue: mp.Queue[object] = _CONTEXT.Queue()
    server = LegacyLocalServer(queue, max_interval=0.1)
    server.start()
    try:
        with subprocess.Popen(["sleep", "1000"]) as worker:
            server.register_timers([TimerRequest(worker.pid, "hang", time.time() + 0.2)])
            queue.close()
            assert worker.wait(LIMIT) == -signal.SIGKILL
    finally:
        server.stop()
