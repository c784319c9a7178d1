"""Blocks of the drop-in pairs on either road: real servers, real workers."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch import expires
from hangwatch.timer import _targets as targets
from hangwatch.timer._client import DropInClient
from support import pair_workers
from support.pairs import (
    CONTEXT,
    KILLED,
    Pair,
    exit_status,
    hang,
    ignore_sigterm,
    running,
    stay,
    take_the_legacy_road,
)
from support.watchers import wait_until


class TestTheNativeRoad:
    def test_a_hung_worker_is_killed_and_explained(self, pair: Pair, tmp_path: Path) -> None:
        with running(pair):
            well, gate = pair.gated(stay)
            gate.recv()
            assert exit_status(pair.worker(hang)) == KILLED
            # Nothing goes through the legacy transport.
            assert pair.server._timers == {}
            assert pair.server._request_queue.size() == 0
            gate.send("go on")
            assert exit_status(well) == 0
        (report,) = (tmp_path / "reports").glob("[!.]*/report.txt")
        assert "in hang" in report.read_text()

    def test_a_forked_worker_finds_it(self) -> None:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        server = hangwatch.LocalTimerServer(queue, report_dir=None)
        server.start()
        try:
            worker = context.Process(target=pair_workers.hang_natively, args=(queue,))
            worker.start()
            assert exit_status(worker) == KILLED
        finally:
            server.stop()

    def test_a_client_is_asked_once_for_blocks_that_replace_no_timer(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Afterwards they cost what any block costs."""
        asked: list[str] = []

        def begin(client: DropInClient, block: Any, chosen: Any) -> Any:
            asked.append(block.scope)
            return as_built(client, block, chosen)

        as_built = DropInClient.begin
        monkeypatch.setattr(DropInClient, "begin", begin)
        with running(pair):
            client = pair.client()
            wait_until(lambda: client._connected() is not None, "the watcher")
            for _ in range(10):
                with expires(600, "outer", client), expires(600, "inner", client):
                    pass
            assert asked == ["outer", "inner"]
            asked.clear()
            for _ in range(3):
                with hangwatch.expires(600, "outer", client) as outer:
                    with hangwatch.expires(900, "outer", client):
                        assert outer.remaining() == inf
                    assert outer.remaining() <= 600
            assert asked == ["outer"] * 3, "the inner ones"

    def test_a_server_that_is_restarted_watches_again(self, pair: Pair) -> None:
        with running(pair):
            worker, gate = pair.gated(pair_workers.enter_a_longer_block)
            gate.recv()
            pair.server.stop()
            pair.server._joined = False
            pair.server.start()
            gate.send("enter it")
            gate.recv()
            wait_until(lambda: pair.server._joined, "the worker is known to the new watcher")
            gate.send("overrun it")
            assert exit_status(worker) == KILLED

    def test_a_server_in_a_forked_child_is_not_the_child_s_to_stop(self, tmp_path: Path) -> None:
        pair = Pair("local", tmp_path)
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


class TestTheLegacyRoad:
    def test_a_hung_worker_is_killed(self, pair: Pair) -> None:
        take_the_legacy_road(pair)
        try:
            well, gate = pair.gated(stay)
            gate.recv()
            assert exit_status(pair.worker(hang)) == KILLED
            gate.send("go on")
            assert exit_status(well) == 0
        finally:
            pair.server.stop()

    def test_an_overridden_reap_worker_is_called(self) -> None:
        reaped = []

        class Server(hangwatch.LocalTimerServer):
            def _reap_worker(self, worker_id: int) -> bool:
                reaped.append(worker_id)
                return super()._reap_worker(worker_id)

        queue = CONTEXT.Queue()
        server = Server(queue, 0.05, report_dir=None)
        server.start()
        try:
            worker = CONTEXT.Process(target=pair_workers.hang_on, args=(queue,))
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
            worker = CONTEXT.Process(target=pair_workers.hang_on, args=(str(tmp_path / "fifo"),))
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
                assert server._companion is None
                worker = CONTEXT.Process(target=pair_workers.hang_on, args=(queue,))
                worker.start()
                assert exit_status(worker) == KILLED
            finally:
                server.stop()

    def test_dead_workers_timers_are_forgotten(self, tmp_path: Path) -> None:
        pair = Pair("file", tmp_path)
        take_the_legacy_road(pair)
        try:
            worker, gate = pair.gated(pair_workers.acquire_and_end, pair.place)
            wait_until(lambda: list(pair.server._timers) == [(worker.pid, "left")], "its timer")
            gate.send("end")
            assert exit_status(worker) == 0
            wait_until(lambda: pair.server._timers == {}, "no timers")
        finally:
            pair.server.stop()

    def test_sigterm_ignored_is_followed_by_sigkill(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(targets, "ESCALATE_AFTER", 0.3)
        pair = Pair("file", tmp_path, max_interval=0.05)
        take_the_legacy_road(pair)
        try:
            assert exit_status(pair.worker(ignore_sigterm, pair.place)) == KILLED
        finally:
            pair.server.stop()


@pytest.fixture(params=["local-native", "file-native", "local-legacy", "file-legacy"])
def road(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Return a pair whose server runs."""
    name, _, kind = request.param.partition("-")
    pair = Pair(name, tmp_path)
    if kind == "legacy":
        take_the_legacy_road(pair)
    else:
        pair.server.start()
    yield pair
    pair.server.stop()


each_road = pytest.mark.parametrize("road", ["local-native", "file-legacy"], indirect=True)
"""What has the same code in both pairs is shown with one of them on each road."""


class TestBothRoads:
    def test_a_worker_survives_a_server_that_stops_in_the_middle_of_a_block(
        self, road: Pair
    ) -> None:
        worker, gate = road.gated(pair_workers.stay_in_two_blocks)
        gate.recv()
        road.server.stop()
        gate.send("leave them")
        assert exit_status(worker) == 0

    @each_road
    def test_who_has_time_left_lives_and_who_has_none_is_killed(
        self, road: Pair, tmp_path: Path
    ) -> None:
        """Of replaced, cancelled, renewed, paused and released timers only the valid one counts.

        What must not end a worker would have been due before what ends the others.
        """
        survivors = {body.__name__: road.gated(body, road.place) for body in pair_workers.SURVIVORS}
        for _, gate in survivors.values():
            gate.recv()
        # Neither the server's own process is ended, nor are its children along with it.
        with hangwatch.expires(0.1, "own", road.client()):
            hanging = {
                body.__name__: road.worker(body, road.place) for body in pair_workers.HANGING
            }
            statuses = {name: exit_status(worker) for name, worker in hanging.items()}
        assert statuses == dict.fromkeys(hanging, KILLED)
        for _, gate in survivors.values():
            with contextlib.suppress(BrokenPipeError):  # that it was ended is what comes out next
                gate.send("go on")
        statuses = {name: exit_status(worker) for name, (worker, _) in survivors.items()}
        assert statuses == dict.fromkeys(survivors, 0)
        reports = [
            json.loads(path.read_text())
            for path in (tmp_path / "reports").glob("[!.]*/report.json")
        ]
        expired = {report["worker"]["pid"] for report in reports}
        assert not expired & {worker.pid for worker, _ in survivors.values()}

    @each_road
    def test_handles_mean_the_same(self, road: Pair) -> None:
        client = road.client()
        with hangwatch.expires(600, "step", client) as timer:
            time.sleep(0.02)
            with hangwatch.expires(900, "step", client):
                inside = time.monotonic()
            assert timer.remaining() + time.monotonic() > inside + 599.99, "its own time, anew"
            timer.cancel()
            with hangwatch.expires(900, "step", client):
                pass
            assert timer.remaining() == inf, "it stays cancelled"
            timer.renew(300)
            with hangwatch.expires(900, "step", client):
                pass
            assert 0 < timer.remaining() <= 300, "it stays renewed"
            with hangwatch.paused("pause", 900, client):
                before = timer.remaining()
                time.sleep(0.01)
                assert timer.remaining() == before

    @each_road
    def test_replaced_methods_are_called_once_a_block(self, road: Pair) -> None:
        client = road.client()
        calls: list[tuple[str, str]] = []
        acquire, release = client.acquire, client.release

        def count_acquire(scope_id: str, expiration_time: float) -> None:
            calls.append(("acquire", scope_id))
            acquire(scope_id, expiration_time)

        def count_release(scope_id: str) -> None:
            calls.append(("release", scope_id))
            release(scope_id)

        with hangwatch.expires(600, "before", client):
            pass
        client.acquire, client.release = count_acquire, count_release  # type: ignore[method-assign]
        for _ in range(2):
            with hangwatch.expires(600, "test", client):
                pass
        assert calls == [("acquire", "test"), ("release", "test")] * 2
