"""Blocks of the drop-in pairs on either road: real servers, real workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hangwatch
from hangwatch.pairs import place
from hangwatch.worker.client import WorkerClient
from support.nursery import LIMIT
from support.pairs import (
    CONTEXT,
    KILLED,
    Pair,
    behave,
    client_at,
    exit_status,
    hang,
    ignore_sigterm,
    running,
    take_the_legacy_road,
)
from support.watchers import wait_until


class TestTheNativeRoad:
    def test_a_hung_worker_is_killed_and_explained(self, pair: Pair, tmp_path: Path) -> None:
        with running(pair):
            well = pair.worker(behave)
            assert exit_status(pair.worker(hang)) == KILLED
            assert exit_status(well) == 0
        (report,) = (tmp_path / "reports").glob("*/report.txt")
        assert "in hang" in report.read_text()

    def test_nothing_goes_through_the_legacy_transport(self, pair: Pair) -> None:
        with running(pair):
            assert exit_status(pair.worker(behave)) == 0
            assert not pair.server._joined or pair.server._timers == {}
            assert pair.server._request_queue.size() == 0

    @pytest.mark.parametrize("method", ["fork", "forkserver"])
    def test_workers_of_every_start_method_find_it(self, tmp_path: Path, method: str) -> None:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        server = hangwatch.LocalTimerServer(queue, report_dir=None)
        server.start()
        try:
            worker = context.Process(target=_hang_natively, args=(queue,))  # type: ignore[attr-defined]
            worker.start()
            assert exit_status(worker) == KILLED
        finally:
            server.stop()

    def test_a_server_that_is_restarted_watches_again(self, pair: Pair) -> None:
        ready, go = CONTEXT.Event(), CONTEXT.Event()
        with running(pair):
            worker = pair.worker(_hang_after, ready, go)
            assert ready.wait(LIMIT)
            pair.server.stop()
            pair.server.start()
            go.set()
            assert exit_status(worker) == KILLED

    def test_the_link_is_gone_after_stop_and_after_a_crash_swept(
        self, pair: Pair, tmp_path: Path
    ) -> None:
        pair.server.start()
        link = pair.server._link()
        assert link is not None
        assert os.path.exists(link)
        pair.server.stop()
        assert not os.path.lexists(link)
        os.symlink(str(tmp_path / "nobody"), link)
        place.sweep()
        assert not os.path.lexists(link)

    def test_a_server_in_a_forked_child_is_not_the_child_s_to_stop(self, pair: Pair) -> None:
        with running(pair):
            pid = os.fork()
            if pid == 0:
                pair.server.stop()
                os._exit(0)
            os.waitpid(pid, 0)
            link = pair.server._link()
            assert link is not None
            assert os.path.exists(link)
            assert exit_status(pair.worker(hang)) == KILLED


def _hang_natively(queue: object) -> None:
    client = client_at(queue)
    with hangwatch.expires(0.3, "hang", client):
        worker: WorkerClient | None = client._worker
        if worker is None or not worker.is_connected:
            os._exit(7)
        time.sleep(30)


def _hang_after(ready: threading.Event, go: threading.Event) -> None:
    # The first watcher promises to look again within 8 s; the second block is due later.
    with hangwatch.expires(8, "before"):
        pass
    ready.set()
    go.wait()
    with hangwatch.expires(9, "after"):
        time.sleep(40)


def _wait_in_a_block(ready: threading.Event, go: threading.Event) -> None:
    with hangwatch.expires(60, "outer"), hangwatch.expires(60, "inner"):
        ready.set()
        go.wait()


class TestTheLegacyRoad:
    def test_a_hung_worker_is_killed(self, pair: Pair) -> None:
        take_the_legacy_road(pair)
        try:
            well = pair.worker(behave)
            assert exit_status(pair.worker(hang)) == KILLED
            assert exit_status(well) == 0
        finally:
            pair.server.stop()

    def test_an_overridden_reap_worker_is_called(self, tmp_path: Path) -> None:
        reaped = []

        class Server(hangwatch.LocalTimerServer):
            def _reap_worker(self, worker_id: int) -> bool:
                reaped.append(worker_id)
                return super()._reap_worker(worker_id)

        queue = CONTEXT.Queue()
        server = Server(queue, 0.05, report_dir=None)
        server.start()
        try:
            worker = CONTEXT.Process(target=_hang_on, args=(queue,))
            worker.start()
            assert exit_status(worker) == KILLED
            assert reaped[0] == worker.pid
        finally:
            server.stop()

    def test_a_worker_that_is_not_reaped_is_tried_again(self, tmp_path: Path) -> None:
        tried = []

        class Server(hangwatch.FileTimerServer):
            def _reap_worker(self, worker_pid: int, signal: int = 0) -> bool:
                tried.append((worker_pid, signal))
                return len(tried) > 3 and super()._reap_worker(worker_pid, signal)

        server = Server(str(tmp_path / "fifo"), "run", 0.05, report_dir=None)
        server.start()
        try:
            worker = CONTEXT.Process(target=_hang_on, args=(str(tmp_path / "fifo"),))
            worker.start()
            assert exit_status(worker) == KILLED
        finally:
            server.stop()
        assert tried[:4] == [(worker.pid, signal.SIGKILL)] * 4

    def test_a_process_that_we_may_not_signal_is_running(self) -> None:
        ask = hangwatch.FileTimerServer.is_process_running
        assert not ask(0)
        assert not ask(-1)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            os._exit(0 if ask(1) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not ask(child)

    def test_a_manager_s_queue_has_no_other_road(self) -> None:
        with CONTEXT.Manager() as manager:
            queue = manager.Queue()
            server = hangwatch.LocalTimerServer(queue, report_dir=None)
            server.start()
            try:
                assert server._beside is None
                worker = CONTEXT.Process(target=_hang_on, args=(queue,))
                worker.start()
                assert exit_status(worker) == KILLED
            finally:
                server.stop()

    def test_dead_workers_timers_are_forgotten(self, pair: Pair) -> None:
        take_the_legacy_road(pair)
        try:
            worker = pair.worker(_acquire_and_end, pair.place)
            assert exit_status(worker) == 0
            wait_until(lambda: pair.server._timers == {}, "no timers")
        finally:
            pair.server.stop()

    def test_two_threads_in_one_scope_have_a_timer_each(self, pair: Pair) -> None:
        take_the_legacy_road(pair)
        try:
            assert exit_status(pair.worker(_hang_in_one_of_two_threads)) == KILLED
        finally:
            pair.server.stop()

    def test_sigterm_ignored_is_followed_by_sigkill(self, tmp_path: Path) -> None:
        pair = Pair("file", tmp_path, max_interval=0.05)
        take_the_legacy_road(pair)
        try:
            assert exit_status(pair.worker(ignore_sigterm, pair.place)) == KILLED
        finally:
            pair.server.stop()


def _hang_on(queue: object) -> None:
    hangwatch.configure(client_at(queue))
    hang()


def _acquire_and_end(where: object) -> None:
    client_at(where).acquire("left", time.time() + 60)
    time.sleep(0.5)


def _hang_in_one_of_two_threads() -> None:
    entered = threading.Event()

    def other() -> None:
        with hangwatch.expires(1.0, "shared"):
            entered.set()
            time.sleep(30)

    threading.Thread(target=other, daemon=True).start()
    entered.wait()
    with hangwatch.expires(60, "shared"):
        pass
    time.sleep(20)


def _handle_and_pause() -> None:
    with hangwatch.expires(1.2, "step") as timer:
        timer.cancel()
        with hangwatch.expires(1.2, "step"):
            pass
        time.sleep(2)  # it stays cancelled
        timer.renew(60)
        with hangwatch.expires(1.2, "step"):
            pass
        time.sleep(2)  # and so it stays renewed
    with hangwatch.expires(1.2, "step"), hangwatch.paused("step", after=60):
        time.sleep(2)


def _overrun_a_pause() -> None:
    with hangwatch.expires(60, "step"), hangwatch.paused("step", after=0.5):
        time.sleep(30)


def _hang_in_a_pause_of_the_same_name() -> None:
    with hangwatch.paused("step", after=0.7), hangwatch.expires(0.1, "step"):
        time.sleep(30)


@pytest.fixture(params=["native", "legacy"])
def road(request: pytest.FixtureRequest, pair: Pair) -> Iterator[str]:
    if request.param == "legacy":
        take_the_legacy_road(pair)
    else:
        pair.server.start()
    yield str(request.param)
    pair.server.stop()


class TestBothRoads:
    def test_a_worker_survives_a_server_that_stops_in_the_middle_of_a_block(
        self, pair: Pair, road: str
    ) -> None:
        ready, go = CONTEXT.Event(), CONTEXT.Event()
        worker = pair.worker(_wait_in_a_block, ready, go)
        assert ready.wait(LIMIT)
        pair.server.stop()
        go.set()
        assert exit_status(worker) == 0

    def test_an_inner_block_of_the_same_scope_replaces_the_outer(
        self, pair: Pair, road: str
    ) -> None:
        said = CONTEXT.Event()
        worker = pair.worker(_recurse, said)
        assert exit_status(worker) == KILLED
        assert said.is_set()  # it was not killed before the last block

    def test_whatever_finds_the_block_its_scope_s_outer_one_is_replaced(
        self, pair: Pair, road: str
    ) -> None:
        assert exit_status(pair.worker(_same_scope_in_two_ways, pair.place)) == 0

    def test_the_server_s_own_process_is_never_killed(self, pair: Pair, road: str) -> None:
        child = pair.worker(behave, 2.5)  # whatever descends from us isn't, either
        with hangwatch.expires(0.2, "own", pair.client()):
            time.sleep(1.5)
        assert exit_status(child) == 0

    def test_handles_and_pauses_mean_the_same(self, pair: Pair, road: str) -> None:
        assert exit_status(pair.worker(_handle_and_pause)) == 0
        assert exit_status(pair.worker(_overrun_a_pause)) == KILLED
        assert exit_status(pair.worker(_hang_in_a_pause_of_the_same_name)) == KILLED

    def test_a_call_replaces_and_a_release_ends_it(self, pair: Pair, road: str) -> None:
        assert exit_status(pair.worker(_call_by_hand, pair.place)) == 0

    def test_calls_stand_alone(self, pair: Pair, road: str) -> None:
        # Neither the end of a block around, nor that of an older timer, ends a later one.
        assert exit_status(pair.worker(_leave_the_second_armed, pair.place)) == KILLED

    def test_a_forked_child_has_timers_of_its_own(self, pair: Pair, road: str) -> None:
        assert exit_status(pair.worker(_fork_in_a_block)) == 0

    def test_replaced_methods_are_called_once_a_block(self, pair: Pair, road: str) -> None:
        client = pair.client()
        calls: list[tuple[str, str]] = []
        acquire, release = client.acquire, client.release

        def count_acquire(scope_id: str, expiration_time: float) -> None:
            calls.append(("acquire", scope_id))
            acquire(scope_id, expiration_time)

        def count_release(scope_id: str) -> None:
            calls.append(("release", scope_id))
            release(scope_id)

        with hangwatch.expires(30, "before", client):
            pass
        client.acquire, client.release = count_acquire, count_release  # type: ignore[method-assign]
        for _ in range(2):
            with hangwatch.expires(30, "test", client):
                pass
        assert calls == [("acquire", "test"), ("release", "test")] * 2


def _recurse(said: threading.Event) -> None:
    def nested(depth: int) -> None:
        with hangwatch.expires(after=3, scope="recursive"):
            if depth:
                nested(depth - 1)
            time.sleep(1)

    nested(3)
    with hangwatch.expires(after=1.5, scope="outer"):
        with hangwatch.expires(after=30, scope="outer"):
            time.sleep(2)
        time.sleep(0.1)
        said.set()
        time.sleep(30)


def _same_scope_in_two_ways(where: object) -> None:
    client = client_at(where)
    hangwatch.configure(client)
    for _ in range(3):
        with hangwatch.expires(30, "s", client=client):
            pass
    with hangwatch.expires(1.0, "s"):
        with hangwatch.expires(30, "s", client=client):
            time.sleep(1.5)
        time.sleep(0.1)


def _call_by_hand(where: object) -> None:
    client = client_at(where)
    for _ in range(10):  # a heartbeat
        client.acquire("beat", time.time() + 2.0)
        time.sleep(0.3)
    # Another thread may release it.
    thread = threading.Thread(target=client.release, args=("beat",))
    thread.start()
    thread.join()
    client.release("nothing")  # that there is nothing to release does no harm
    time.sleep(2.5)


def _leave_the_second_armed(where: object) -> None:
    client = client_at(where)
    with hangwatch.expires(30, "around"):
        client.acquire("first", time.time() + 30)
        client.acquire("second", time.time() + 1.0)
    client.release("first")
    time.sleep(30)


def _fork_in_a_block() -> None:
    with hangwatch.expires(2, "parent's"):
        pid = os.fork()
        if pid == 0:
            time.sleep(3)  # longer than the parent's block may take
            with hangwatch.expires(30, "parent's"):
                pass
            time.sleep(3)
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    os._exit(0 if status == 0 else 1)
