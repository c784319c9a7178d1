"""The servers of the drop-in pairs: start and stop, what they tell, which signals they send."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.file_based_local_timer import FileTimerRequest
from support.nursery import LIMIT
from support.pairs import (
    CONTEXT,
    KILLED,
    Pair,
    behave,
    exit_status,
    hang,
    ignore_sigterm,
    running,
)
from support.processes import is_alive
from support.watchers import wait_until


class TestLifecycle:
    def test_every_order_of_start_and_stop(self, pair: Pair) -> None:
        server = pair.server
        threads = threading.active_count()
        files = len(os.listdir("/proc/self/fd"))
        server.stop()
        for _ in range(3):
            server.start()
            server.start()
            began = time.monotonic()
            server.stop()
            server.stop()
            assert time.monotonic() - began < 5  # a second, were it not for a busy machine
        assert threading.active_count() <= threads
        assert len(os.listdir("/proc/self/fd")) <= files
        server.start()
        try:
            assert exit_status(pair.worker(hang)) == KILLED
        finally:
            server.stop()

    def test_stop_does_not_wait_for_an_incident(self, pair: Pair) -> None:
        pair.server.start()
        worker = pair.worker(hang)
        wait_until(lambda: pair.server._joined, "a worker")
        time.sleep(0.31)  # in the middle of the evidence, or about
        began = time.monotonic()
        pair.server.stop()
        assert time.monotonic() - began < 5
        worker.kill()
        worker.join()

    def test_stop_ends_a_stopped_watcher(self, pair: Pair) -> None:
        pair.server.start()
        assert pair.server._beside is not None
        keeper = pair.server._beside.pid
        os.kill(keeper, signal.SIGSTOP)
        pair.server.stop()
        wait_until(lambda: not is_alive(keeper), "the keeper's end")

    def test_no_zombie_is_left(self, pair: Pair) -> None:
        pair.server.start()
        assert pair.server._beside is not None
        keeper = pair.server._beside.pid
        pair.server.stop()
        wait_until(lambda: not os.path.exists(f"/proc/{keeper}"), "the keeper's end")


class TestEvents:
    def test_log_event_hears_it_all_in_this_process(self, tmp_path: Path) -> None:
        heard: list[tuple[str, FileTimerRequest | None]] = []
        pair = Pair("file", tmp_path, log_event=lambda name, request: heard.append((name, request)))
        before = time.time()
        with running(pair):
            worker = pair.worker(hang)
            assert exit_status(worker) == KILLED
            wait_until(lambda: len(heard) == 3, "three events")
        names = ["watchdog started", "timer expired", "kill worker process", "watchdog stopped"]
        assert [name for name, _ in heard] == names
        expired, killed = heard[1][1], heard[2][1]
        assert expired is not None
        assert expired == killed
        assert (expired.worker_pid, expired.scope_id) == (worker.pid, "hang")
        assert expired.signal == signal.SIGKILL
        assert before < expired.expiration_time < time.time()

    def test_a_log_event_that_raises_does_no_harm(self, tmp_path: Path) -> None:
        def fail(name: str, request: FileTimerRequest | None) -> None:
            raise ValueError(name)

        with running(Pair("file", tmp_path, log_event=fail)) as pair:
            assert exit_status(pair.worker(hang)) == KILLED

    def test_last_progress_is_now_and_then_the_watcher_s(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            server = pair.server
            assert isinstance(server, hangwatch.FileTimerServer)
            assert time.time() - server.get_last_progress_time() < 10
            assert exit_status(pair.worker(behave)) == 0
            wait_until(lambda: server._joined, "that a client was seen")
            assert server._beside is not None
            os.kill(server._beside.pid, signal.SIGSTOP)
            watcher = _child_of(server._beside.pid)
            os.kill(watcher, signal.SIGSTOP)
            time.sleep(0.5)
            stopped = server._last_progress
            time.sleep(1.5)
            assert server._last_progress == stopped
            os.kill(watcher, signal.SIGCONT)


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class TestSignals:
    @pytest.mark.parametrize("number", [0, -1])
    def test_a_timer_of_no_signal_never_kills(self, tmp_path: Path, number: int) -> None:
        heard: list[str] = []
        pair = Pair("file", tmp_path, log_event=lambda name, request: heard.append(name))
        with running(pair):
            assert exit_status(pair.worker(_overrun, pair.place, number, 2)) == 0
            wait_until(lambda: "timer expired" in heard, "the event")
        assert "kill worker process" not in heard

    def test_the_client_s_signal_comes_first(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            status = exit_status(pair.worker(_overrun, pair.place, signal.SIGTERM, 60))
            assert status == -signal.SIGTERM

    def test_who_leaves_the_block_on_its_signal_lives(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            assert exit_status(pair.worker(_catch_the_signal, pair.place)) == 0

    def test_an_ignored_signal_is_followed_by_sigkill(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            assert exit_status(pair.worker(ignore_sigterm, pair.place)) == KILLED


def _overrun(path: str, number: int, seconds: float) -> None:
    with hangwatch.expires(0.3, "overrun", hangwatch.FileTimerClient(path, signal=number)):
        time.sleep(seconds)


def _catch_the_signal(path: str) -> None:
    try:
        with hangwatch.expires(0.3, "x", hangwatch.FileTimerClient(path, signal=signal.SIGINT)):
            time.sleep(30)
    except KeyboardInterrupt:
        time.sleep(6)  # longer than SIGKILL would take
        os._exit(0)


@pytest.mark.parametrize("name", ["local", "file"])
def test_clients_travel_to_workers(name: str, tmp_path: Path) -> None:
    with running(Pair(name, tmp_path)) as pair:
        client = pair.client()
        with hangwatch.expires(30, "here", client):
            pass
        if name == "file":
            pickle.loads(pickle.dumps(client))
        worker = CONTEXT.Process(target=_hang_with, args=(client,))
        worker.start()
        assert exit_status(worker) == KILLED


def _hang_with(client: hangwatch.TimerClient) -> None:
    with hangwatch.expires(0.3, "there", client):
        time.sleep(30)


class TestWhatPeopleCall:
    def test_run_once_takes_what_is_there_goes_a_round_and_stops(self, tmp_path: Path) -> None:
        heard: list[tuple[str, str]] = []
        server = hangwatch.FileTimerServer(
            str(tmp_path / "fifo"),
            "run",
            log_event=lambda name, request: heard.append(
                (name, request.scope_id if request else "")
            ),
            report_dir=None,
        )
        server.start()
        client = hangwatch.FileTimerClient(str(tmp_path / "fifo"))
        with subprocess.Popen(["sleep", "60"]) as worker:
            for scope, until in ("far", time.time() + 60), ("due", time.time() - 1):
                client._send_request(
                    FileTimerRequest(worker.pid, scope, until, int(signal.SIGKILL))
                )
            server.run_once()
            assert worker.wait(LIMIT) == KILLED
        assert server._request_count == 2
        assert server._timers == {}
        assert heard == [
            ("watchdog started", ""),
            ("timer expired", "due"),
            ("kill worker process", "due"),
        ]
        assert not (tmp_path / "fifo").exists()
        server.run_once()  # without a start it only removes the FIFO
        server.stop()

    def test_a_replaced_run_watchdog_goes_the_rounds(self, tmp_path: Path) -> None:
        for pair in (Pair(name, tmp_path, max_interval=0.02) for name in ("local", "file")):
            rounds: list[int] = []
            go_round = pair.server._run_watchdog

            def count(
                *arguments: object, go_round: Any = go_round, rounds: list[int] = rounds
            ) -> None:
                rounds.append(1)
                go_round(*arguments)

            pair.server._run_watchdog = count  # type: ignore[method-assign]
            with running(pair):
                wait_until(lambda: len(rounds) >= 10, "ten rounds")  # noqa: B023
                before, began = len(rounds), time.monotonic()
                time.sleep(1)
                took = time.monotonic() - began
            # Not more often than once an interval; how much less a busy machine may say.
            assert len(rounds) - before <= took / 0.02 + 3

    def test_a_worker_can_be_reaped_by_hand(self, tmp_path: Path) -> None:
        server = hangwatch.FileTimerServer(str(tmp_path / "fifo"), report_dir=None)
        with subprocess.Popen(["sleep", "60"]) as worker:
            assert server._reap_worker(worker.pid, signal.SIGKILL)
            assert worker.wait(LIMIT) == KILLED
        assert server._reap_worker(worker.pid, signal.SIGKILL), "it is dead already"
        assert server._reap_worker(1, signal.SIGKILL), "nothing of ours to kill"
        server.stop()
