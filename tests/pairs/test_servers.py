"""The servers of the drop-in pairs: start and stop, what they tell, which signals they send."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hangwatch
from hangwatch.timer import _place as place
from hangwatch.timer.file_based_local_timer import FileTimerRequest
from support import pair_workers
from support.nursery import LIMIT, nursery
from support.pairs import (
    CONTEXT,
    KILLED,
    Pair,
    exit_status,
    hang,
    ignore_sigterm,
    running,
    take_the_legacy_road,
)
from support.processes import is_alive
from support.watchers import wait_until, watcher_below


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A child of ours that does not end by itself."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        yield child
        child.kill()


class TestLifecycle:
    def test_every_order_of_start_and_stop_leaves_nothing_behind(self, pair: Pair) -> None:
        server = pair.server
        threads = threading.active_count()
        files = len(os.listdir("/proc/self/fd"))
        server.stop()
        for _ in range(2):
            server.start()
            server.start()
            assert server._companion is not None
            keeper = server._companion.pid
            link = server._link()
            assert link is not None
            assert os.path.exists(link)
            server.stop()
            server.stop()
            assert not os.path.lexists(link)
            wait_until(lambda: not os.path.exists(f"/proc/{keeper}"), "no zombie is left")  # noqa: B023
        assert threading.active_count() <= threads
        assert len(os.listdir("/proc/self/fd")) <= files
        with running(pair):
            # Clients travel to workers, those that were used among them.
            client = pair.client()
            with hangwatch.expires(600, "here", client):
                pass
            worker = CONTEXT.Process(target=pair_workers.hang_with, args=(client,))
            worker.start()
            assert exit_status(worker) == KILLED

    def test_what_a_crash_left_is_swept(self, pair: Pair, tmp_path: Path) -> None:
        pair.server.start()
        link = pair.server._link()
        assert link is not None
        pair.server.stop()
        os.symlink(str(tmp_path / "nobody"), link)
        place.sweep()
        assert not os.path.lexists(link)

    def test_stop_does_not_wait_for_an_incident(self, tmp_path: Path) -> None:
        heard: list[str] = []
        pair = Pair("file", tmp_path, log_event=lambda name, request: heard.append(name))
        with running(pair):
            assert pair.server._companion is not None
            keeper = pair.server._companion.pid
            worker = pair.worker(pair_workers.ignore_sigterm_for_long, pair.place)
            wait_until(lambda: "timer expired" in heard, "an incident")
            pair.server.stop()
            assert worker.is_alive(), "its grace lasts longer than any stop"
        worker.kill()
        assert exit_status(worker) == KILLED
        wait_until(lambda: not is_alive(keeper), "the watcher ends the incident, and itself")

    def test_stop_ends_a_stopped_watcher(self, tmp_path: Path) -> None:
        pair = Pair("local", tmp_path)
        pair.server.start()
        assert pair.server._companion is not None
        keeper = pair.server._companion.pid
        os.kill(keeper, signal.SIGSTOP)
        pair.server.stop()
        wait_until(lambda: not is_alive(keeper), "the keeper's end")


class TestEvents:
    def test_log_event_hears_it_all_in_this_process_even_if_it_raises(self, tmp_path: Path) -> None:
        heard: list[tuple[str, FileTimerRequest | None]] = []

        def log_event(name: str, request: FileTimerRequest | None) -> None:
            heard.append((name, request))
            raise ValueError(name)

        before = time.time()
        with running(Pair("file", tmp_path, log_event=log_event)) as pair:
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

    def test_last_progress_is_now_and_then_the_watcher_s(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            server = pair.server
            assert isinstance(server, hangwatch.FileTimerServer)
            now = time.time()
            wait_until(lambda: server.get_last_progress_time() > now, "progress")
            assert server._companion is not None
            keeper = server._companion.pid
            wait_until(lambda: watcher_below(keeper), "the watcher")
            watcher = watcher_below(keeper)
            assert watcher is not None
            for pid in keeper, watcher:
                os.kill(pid, signal.SIGSTOP)
                wait_until(lambda: _is_stopped(pid), "its stop")  # noqa: B023
            _go_two_rounds(server, "what the watcher told before")
            stopped = server._last_progress
            _go_two_rounds(server, "nothing more is heard of it")
            assert server._last_progress == stopped
            # The keeper last: one that goes on beside a stopped watcher replaces it.
            for pid in watcher, keeper:
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: server._last_progress > stopped, "progress again")


def _is_stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def _go_two_rounds(server: hangwatch.FileTimerServer, scope: str) -> None:
    """Wait until the server has taken requests twice, by its legacy road."""
    for name in scope, f"{scope}, again":
        request = FileTimerRequest(os.getpid(), name, time.time() + 600, int(signal.SIGKILL))
        hangwatch.FileTimerClient(server._file_path)._send_request(request)
        wait_until(lambda: (os.getpid(), name) in server._timers, "a round")  # noqa: B023


# In a process that has loaded bdb, as pytest's have, a soft signal is only reported.
LEAVES_ON_ITS_SIGNAL = """
import signal, sys, time, hangwatch
client = hangwatch.FileTimerClient(sys.argv[1], signal=signal.SIGINT)
try:
    with hangwatch.expires(0.2, "left", client):
        time.sleep(1000)
except KeyboardInterrupt:
    print("left", flush=True)
    sys.stdin.readline()
"""


class TestSignals:
    def test_a_timer_of_no_signal_never_kills_and_a_client_s_signal_comes_first(
        self, tmp_path: Path
    ) -> None:
        heard: list[tuple[str, str]] = []

        def log_event(name: str, request: FileTimerRequest | None) -> None:
            if request is not None:
                heard.append((name, request.scope_id))

        with running(Pair("file", tmp_path, log_event=log_event)) as pair:
            spared = [
                pair.gated(pair_workers.overrun, pair.place, number, f"{number}")
                for number in (0, -1)
            ]
            for number in 0, -1:
                wait_until(lambda: ("timer expired", f"{number}") in heard, "the event")  # noqa: B023
            _, gate = ended = pair.gated(pair_workers.overrun, pair.place, signal.SIGTERM, "ended")
            with gate:
                assert exit_status(ended[0]) == -signal.SIGTERM
            wait_until(lambda: ("kill worker process", "ended") in heard, "the event")
            for worker, gate in spared:
                gate.send("leave the block")
                assert exit_status(worker) == 0
        assert [scope for name, scope in heard if name == "kill worker process"] == ["ended"]

    def test_who_leaves_the_block_on_its_signal_lives_and_who_does_not_is_killed(
        self, tmp_path: Path
    ) -> None:
        with (
            running(Pair("file", tmp_path)) as pair,
            nursery().fork(LEAVES_ON_ITS_SIGNAL, pair.place, stdin=subprocess.PIPE) as leaver,
        ):
            assert leaver.stdout is not None
            assert leaver.stdout.readline() == "left\n"
            # By then the time to leave the block is up for the other one, too.
            assert exit_status(pair.worker(ignore_sigterm, pair.place)) == KILLED
            leaver.communicate("go on\n")
            assert leaver.returncode == 0


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
        with sleeper() as worker:
            for scope, until in ("far", time.time() + 600), ("due", time.time() - 1):
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
            take_the_legacy_road(pair)
            try:
                wait_until(lambda: rounds, "a round")  # noqa: B023
                before, began = len(rounds), time.monotonic()
                wait_until(lambda: len(rounds) >= before + 11, "eleven more")  # noqa: B023
                took = time.monotonic() - began
            finally:
                pair.server.stop()
            assert took >= 10 * 0.02, "not more often than once an interval"

    def test_a_worker_can_be_reaped_by_hand(self, tmp_path: Path) -> None:
        server = hangwatch.FileTimerServer(str(tmp_path / "fifo"), report_dir=None)
        with sleeper() as worker:
            assert server._reap_worker(worker.pid, signal.SIGKILL)
            assert worker.wait(LIMIT) == KILLED
        assert server._reap_worker(worker.pid, signal.SIGKILL), "it is dead already"
        assert server._reap_worker(1, signal.SIGKILL), "nothing of ours to kill"
        server.stop()
