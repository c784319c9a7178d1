"""Servers, queues and clients as people wrote them against PyTorch's base classes."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import hangwatch
from hangwatch import RequestQueue, TimerClient, TimerRequest, TimerServer
from support.nursery import LIMIT
from support.pairs import CONTEXT
from support.watchers import wait_until

PAST = 1.0
RELEASE = -1.0


class CannedQueue(RequestQueue):
    """Gives out what it was given; waits for more as long as it is allowed to."""

    def __init__(self, *requests: TimerRequest) -> None:
        self.requests = list(requests)
        self.arrived = threading.Condition()
        self.waiting = 0

    def put(self, *requests: TimerRequest) -> None:
        with self.arrived:
            self.requests += requests
            self.arrived.notify_all()

    def size(self) -> int:
        with self.arrived:
            return len(self.requests)

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        with self.arrived:
            self.waiting += 1
            self.arrived.wait_for(lambda: self.requests, timeout)
            self.waiting -= 1
            taken, self.requests = self.requests[:size], self.requests[size:]
            return taken


class BrokenQueue(RequestQueue):
    def __init__(self) -> None:
        self.broken = True

    def size(self) -> int:
        return 0

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        if self.broken:
            raise ValueError("this queue is closed")
        time.sleep(min(timeout, 0.01))
        return [TimerRequest("late", "scope", RELEASE)]


class DictServer(TimerServer):
    """Keeps timers in a dict; its worker ids are names, and nobody is harmed."""

    def __init__(self, queue: RequestQueue, max_interval: float = 0.02) -> None:
        super().__init__(queue, max_interval)
        self.timers: dict[tuple[str, str], TimerRequest] = {}
        self.registered: list[TimerRequest] = []
        self.cleared: list[set[str]] = []
        self.reaped: list[str] = []
        self.answers: dict[str, list[bool]] = {}

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        for request in timer_requests:
            self.registered.append(request)
            if request.expiration_time < 0:
                self.timers.pop((request.worker_id, request.scope_id), None)
            else:
                self.timers[request.worker_id, request.scope_id] = request

    def clear_timers(self, worker_ids: set[str]) -> None:
        self.cleared.append(set(worker_ids))
        for key in [key for key in self.timers if key[0] in worker_ids]:
            del self.timers[key]

    def get_expired_timers(self, deadline: float) -> dict[str, list[TimerRequest]]:
        expired: dict[str, list[TimerRequest]] = {}
        for (worker, _), request in self.timers.items():
            if request.expiration_time <= deadline:
                expired.setdefault(worker, []).append(request)
        return expired

    def _reap_worker(self, worker_id: str) -> bool:
        self.reaped.append(worker_id)
        if worker_id == "raises":
            raise OSError("no such worker")
        answers = self.answers.get(worker_id)
        return answers.pop(0) if answers else True


@contextmanager
def started(server: TimerServer) -> Iterator[None]:
    server.start()
    try:
        yield
    finally:
        server.stop()
        wait_until(lambda: not threads_of(server), "the end of its thread")


def past(worker: str, scope: str = "scope") -> TimerRequest:
    return TimerRequest(worker, scope, PAST)


def threads_of(server: TimerServer) -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == type(server).__name__]


def test_one_round_registers_all_and_clears_exactly_the_reaped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = [
        *(past(worker) for worker in ("raises", "kept", "dies", "released")),
        TimerRequest("healthy", "scope", time.time() + 600),
        TimerRequest("released", "scope", RELEASE),
    ]
    server = DictServer(CannedQueue(*requests))
    server.answers["kept"] = [False, False, True]
    server._run_watchdog()
    assert server.registered == requests
    assert server.reaped == ["raises", "kept", "dies"]
    assert server.cleared == [{"raises", "dies"}]
    (failure,) = [record for record in caplog.records if record.exc_info]
    assert "raises" in failure.getMessage()
    assert failure.exc_info is not None
    assert isinstance(failure.exc_info[1], OSError)
    assert failure.levelno >= logging.ERROR


def test_who_is_not_reaped_is_kept_and_tried_again_each_round() -> None:
    server = DictServer(CannedQueue(past("kept"), past("kept", "another")))
    server.answers["kept"] = [False, False, True]
    for _ in range(4):
        server._run_watchdog()
    assert server.reaped == ["kept"] * 3
    assert server.cleared == [set(), set(), {"kept"}, set()]
    assert not server.timers


def test_what_expires_right_now_has_expired() -> None:
    asked = []

    class Server(DictServer):
        def get_expired_timers(self, deadline: float) -> dict[str, list[TimerRequest]]:
            asked.append(deadline)
            return super().get_expired_timers(deadline)

    before = time.time()
    Server(CannedQueue())._run_watchdog()
    assert before <= asked[0] <= time.time()


def test_a_started_server_does_all_that_by_itself() -> None:
    queue = CannedQueue()
    server = DictServer(queue)
    server.answers["kept"] = [False, False, True]
    with started(server):
        queue.put(past("raises"), past("kept"))
        wait_until(lambda: {"kept"} in server.cleared, "the third attempt")
    assert server.reaped == ["raises", "kept", "kept", "kept"]
    assert [one for one in server.cleared if one] == [{"raises"}, {"kept"}]


def test_stop_does_not_wait_for_a_queue_that_waits_for_long() -> None:
    queue = CannedQueue()
    server = DictServer(queue, max_interval=1000)
    server.start()
    wait_until(lambda: queue.waiting, "the thread in get")
    server.stop()
    assert queue.waiting, "its thread still waits"
    queue.put(past("x"))  # for the thread to end
    wait_until(lambda: not threads_of(server), "the end of its thread")


def test_nobody_is_reaped_after_stop_returned() -> None:
    queue = CannedQueue()
    server = DictServer(queue, max_interval=1000)
    server.start()
    wait_until(lambda: queue.waiting, "the thread in get")
    (thread,) = threads_of(server)
    server.stop()
    queue.put(past("x"))
    thread.join(LIMIT)
    assert not thread.is_alive()
    # What it took from the queue is not lost, since a server may start again.
    assert server.registered == [past("x")]
    assert server.reaped == []
    with started(server):
        queue.put(past("y"))
        wait_until(lambda: server.reaped == ["x", "y"], "what is overdue")
        server.stop()
        queue.put(past("z"))  # for the thread to end


def test_a_second_start_does_nothing() -> None:
    queue = CannedQueue()
    server = DictServer(queue)
    with started(server):
        server.start()
        assert len(threads_of(server)) == 1


def test_start_after_stop_watches_again() -> None:
    queue = CannedQueue()
    server = DictServer(queue)
    with started(server):
        queue.put(past("first"))
        wait_until(lambda: {"first"} in server.cleared, "the first one's end")
    with started(server):
        queue.put(past("second"))
        wait_until(lambda: {"second"} in server.cleared, "the second one's end")
    assert server.reaped == ["first", "second"]


def test_stop_without_start_does_nothing() -> None:
    server = DictServer(CannedQueue())
    server.stop()
    server.stop()
    assert server.registered == []


def test_a_broken_queue_fills_no_log_and_is_used_again(caplog: pytest.LogCaptureFixture) -> None:
    queue = BrokenQueue()
    server = DictServer(queue)
    with started(server):
        wait_until(lambda: len(failures(caplog)) >= 3, "three failures")
        for failure, following in itertools.pairwise(failures(caplog)):
            (back_off,) = failure.args  # type: ignore[misc]
            assert isinstance(back_off, float)
            # Its clock may be set; but not by as much in each of the pauses.
            assert following.created - failure.created > back_off * 0.9 > 0.05
        queue.broken = False
        wait_until(lambda: server.registered, "a round that succeeds")


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


class Recorder(TimerClient):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append(("acquire", scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        self.calls.append(("release", scope_id))


@pytest.mark.parametrize("configured", [False, True])
def test_a_client_is_called_once_a_block(configured: bool) -> None:
    client = Recorder()
    if configured:
        hangwatch.configure(client)
    before = time.time()
    for _ in range(3):  # later blocks of a scope take a shorter way than the first
        with hangwatch.expires(60, "a", None if configured else client):
            assert len(client.calls) % 2 == 1
    with (
        pytest.raises(KeyError),
        hangwatch.expires(60, "b", None if configured else client),
    ):
        raise KeyError
    assert [call[:2] for call in client.calls] == [
        *[("acquire", "a"), ("release", "a")] * 3,
        ("acquire", "b"),
        ("release", "b"),
    ]
    assert all(before + 60 <= call[2] <= time.time() + 60 for call in client.calls[::2])


def test_what_acquire_raises_keeps_the_block_from_being_entered() -> None:
    class Client(Recorder):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            raise ConnectionRefusedError("nobody is there")

    client = Client()
    with pytest.raises(ConnectionRefusedError), hangwatch.expires(60, "a", client):
        pytest.fail("the block was entered")
    assert client.calls == []


def test_overriding_acquire_alone_of_a_client_of_ours() -> None:
    calls = []

    class Client(hangwatch.LocalTimerClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            calls.append(scope_id)
            super().acquire(scope_id, expiration_time)

    queue = CONTEXT.Queue()
    # With a watcher beside it: nothing may go round the method.
    server = hangwatch.LocalTimerServer(queue, report_dir=None)
    with started(server):
        hangwatch.configure(Client(queue))
        for scope in "ab":
            with hangwatch.expires(60, scope):
                pass
        assert calls == ["a", "b"]
    # And without one, what came through the queue: each timer and its release, once.
    hangwatch.configure(Client(queue))
    for scope in "cd":
        with hangwatch.expires(60, scope):
            pass
    requests = [queue.get(timeout=LIMIT) for _ in range(4)]
    assert [(one.worker_id, one.scope_id, one.expiration_time > 0) for one in requests] == [
        (os.getpid(), scope, armed) for scope in "cd" for armed in (True, False)
    ]
    assert queue.empty()
    queue.close()
    queue.join_thread()
