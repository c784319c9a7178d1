"""What callers and strangers give the drop-in pairs: a clear error, and nobody is hurt."""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.timer import _fifo as fifo
from hangwatch.timer._complaints import Complaints
from hangwatch.timer.api import TimerRequest
from hangwatch.timer.file_based_local_timer import FileTimerRequest, _request_of
from support.nursery import LIMIT
from support.pairs import CONTEXT, KILLED, Pair, exit_status, hang, running


class TestQueues:
    @pytest.mark.parametrize("nonsense", [None, 5, "queue", object()])
    def test_what_is_no_queue(self, nonsense: object) -> None:
        for make in (hangwatch.LocalTimerClient, hangwatch.LocalTimerServer):
            with pytest.raises(TypeError, match="must be a multiprocessing queue"):
                make(nonsense)

    def test_a_queue_that_can_t_be_asked_its_size(self) -> None:
        with pytest.raises(TypeError, match="multiprocessing queue, not SimpleQueue"):
            hangwatch.LocalTimerServer(CONTEXT.SimpleQueue())

    def test_a_closed_queue(self) -> None:
        queue = CONTEXT.Queue()
        server = hangwatch.LocalTimerServer(queue)
        queue.close()
        with pytest.raises(ValueError, match="the queue is closed: make a new one"):
            server.start()
        with pytest.raises(ValueError, match="closed"):
            hangwatch.LocalTimerClient(queue).acquire("x", time.time() + 1)

    def test_a_full_queue_holds_up_nobody(self) -> None:
        queue = CONTEXT.Queue(maxsize=1)
        client = hangwatch.LocalTimerClient(queue)
        for _ in range(20):  # nobody takes anything
            with hangwatch.expires(60, "x", client):
                pass
        # The newest wish of the scope gets there when there is room.
        assert queue.get(timeout=LIMIT).expiration_time > 0
        assert queue.get(timeout=LIMIT).expiration_time == -1

    def test_no_release_overtakes_the_request_that_it_takes_back(self) -> None:
        """Which had no descriptor to be written to: the server would end a healthy worker."""
        queue = CONTEXT.Queue()
        client = hangwatch.LocalTimerClient(queue)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for n in range(100):
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                client.acquire(f"scope {n}", time.time() + 60)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            client.release(f"scope {n}")
        last: dict[str, float] = {}
        while len(last) < 100 or set(last.values()) != {-1}:
            request = queue.get(timeout=LIMIT)
            last[request.scope_id] = request.expiration_time
        client.acquire("the last one", time.time() + 60)
        assert queue.get(timeout=LIMIT).scope_id == "the last one"

    def test_strange_things_in_the_queue_are_dropped_alone(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = hangwatch.LocalTimerServer(CONTEXT.Queue(), report_dir=None)
        good = TimerRequest(os.getpid(), "good", time.time() + 60)
        strange: list[Any] = [
            "text",
            TimerRequest(os.getpid(), "further than a float reaches", 10**400),
            None,
            TimerRequest("pid", "scope", 1.0),
            TimerRequest(1, 2, 1.0),  # type: ignore[arg-type]
            TimerRequest(1, "scope", float("nan")),
            TimerRequest(1, "scope", float("inf")),
            TimerRequest(True, "scope", 1.0),
        ]
        with caplog.at_level(logging.WARNING, "hangwatch"):
            server.register_timers([*strange, good])
        assert list(server._timers) == [(os.getpid(), "good")]
        assert "dropped a request" in caplog.text

    @pytest.mark.parametrize("interval", [-1, float("nan"), float("inf"), "1"])
    def test_a_senseless_interval(self, interval: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="max_interval must be a number of seconds"):
            hangwatch.LocalTimerServer(CONTEXT.Queue(), interval)
        with pytest.raises(ValueError, match="max_interval must be a number of seconds"):
            hangwatch.FileTimerServer(str(tmp_path / "fifo"), max_interval=interval)
        assert not list(tmp_path.iterdir())


class TestPaths:
    def test_a_regular_file_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "precious"
        path.write_text("data")
        with pytest.raises(FileExistsError, match="no FIFO and is left alone: give another path"):
            hangwatch.FileTimerServer(str(path))
        assert path.read_text() == "data"
        with pytest.raises(BrokenPipeError, match="this is no FIFO"):
            hangwatch.FileTimerClient(str(path)).acquire("x", time.time() + 1)
        assert path.read_text() == "data"

    def test_a_file_that_took_the_fifo_s_place_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "fifo"
        with running(Pair("file", tmp_path)):
            path.unlink()
            path.write_text("data")
        assert path.read_text() == "data"

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="a folder that exists and is yours"):
            hangwatch.FileTimerServer(str(tmp_path / "missing" / "fifo"))

    def test_a_folder_that_is_not_writable(self) -> None:
        with pytest.raises(OSError, match="give a path in a folder that exists and is yours"):
            hangwatch.FileTimerServer("/proc/self/fdinfo/fifo")

    def test_a_fifo_that_nobody_reads_is_taken_over_and_left(self, tmp_path: Path) -> None:
        # Left by a server that was killed, or made for us: not ours to delete.
        path = tmp_path / "fifo"
        os.mkfifo(path)
        with running(Pair("file", tmp_path)) as pair:
            assert exit_status(pair.worker(hang)) == KILLED
        assert path.is_fifo()

    def test_a_fifo_that_another_server_reads(self, tmp_path: Path) -> None:
        with (
            running(Pair("file", tmp_path)) as pair,
            pytest.raises(FileExistsError, match="another server reads this FIFO: stop it"),
        ):
            pair.make_server()

    def test_no_server(self, tmp_path: Path) -> None:
        client = hangwatch.FileTimerClient(str(tmp_path / "nothing"))
        with (
            pytest.raises(BrokenPipeError, match="no FileTimerServer reads this FIFO"),
            hangwatch.expires(1, client=client),
        ):
            pytest.fail("the block was entered")

    def test_a_signal_that_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="signal must be 1 to 64"):
            hangwatch.FileTimerClient(str(tmp_path / "fifo"), signal=65)


def line(**changed: object) -> bytes:
    fields = {"version": 1, "pid": 4, "scope_id": "s", "expiration_time": 9.5, "signal": 9}
    return json.dumps(fields | changed).encode() + b"\n"


BAD_LINES = {
    "binary": bytes(range(1, 10)) + b"\xff\xfe\n",
    "no json": b"{]\n",
    "empty": b"\n",
    "no object": b"[1, 2]\n",
    "a number": b"12\n",
    "nested": b"[" * 4000 + b"\n",
    "no pid": b'{"version": 1, "scope_id": "s", "expiration_time": 1, "signal": 9}\n',
    "a pid of text": line(pid="4"),
    "a pid that is true": line(pid=True),
    "a fraction of a pid": line(pid=4.5),
    "a huge pid": line(pid=10**30),
    "a scope that is none": line(scope_id=None),
    "never": line(expiration_time=float("nan")),
    "for ever": line(expiration_time=float("inf")),
    "1e999": line().replace(b"9.5", b"1e999"),
    "a huge time": line().replace(b"9.5", b"1" + b"0" * 400),
    "a time of text": line(expiration_time="9"),
    "signal 65": line(signal=65),
    "a huge signal": line(signal=2**40),
    "too long": line(scope_id="x" * select.PIPE_BUF),
}


@pytest.fixture
def queue(tmp_path: Path) -> Any:
    found = fifo.FifoRequestQueue(str(tmp_path / "fifo"), _request_of, Complaints())
    found.open()
    yield found
    found.close()


class TestLines:
    @pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
    def test_a_bad_line_is_dropped_alone(
        self, bad: bytes, queue: fifo.FifoRequestQueue, caplog: pytest.LogCaptureFixture
    ) -> None:
        writer = os.open(queue.path, os.O_WRONLY)
        with caplog.at_level(logging.WARNING, "hangwatch"):
            for part in (line(scope_id="before"), bad, line(scope_id="after")):
                os.write(writer, part)
                queue.size()
        os.close(writer)
        assert [request.scope_id for request in queue.get(9, 0)] == ["before", "after"]
        assert "dropped a line of the FIFO" in caplog.text

    def test_what_a_writer_did_not_finish_costs_nobody_else_s_line(
        self, queue: fifo.FifoRequestQueue
    ) -> None:
        writer = os.open(queue.path, os.O_WRONLY)
        os.write(writer, line(scope_id="half")[:30])
        os.close(writer)
        fifo.write(queue.path, line(scope_id="whole").decode().strip())
        assert [request.scope_id for request in queue.get(9, 0)] == ["whole"]

    def test_a_line_without_end_takes_no_memory(self, queue: fifo.FifoRequestQueue) -> None:
        writer = os.open(queue.path, os.O_WRONLY)
        for _ in range(40):
            os.write(writer, b"x" * 60_000)
            queue.size()
        os.write(writer, b"\n" + line(scope_id="after"))
        os.close(writer)
        assert len(queue._bytes) <= 1 << 16
        assert [request.scope_id for request in queue.get(9, 0)] == ["after"]

    def test_unknown_keys_are_ignored(self, queue: fifo.FifoRequestQueue) -> None:
        fifo.write(queue.path, line(thread=3, rank="1").decode().strip())
        assert queue.get(1, 0) == [FileTimerRequest(4, "s", 9.5, 9)]

    def test_a_flood_of_bad_lines_is_no_flood_of_records(
        self, queue: fifo.FifoRequestQueue, caplog: pytest.LogCaptureFixture
    ) -> None:
        writer = os.open(queue.path, os.O_WRONLY)
        with caplog.at_level(logging.WARNING, "hangwatch"):
            for _ in range(100):
                os.write(writer, b"bad\n" * 100)
                queue.size()
        os.close(writer)
        assert 1 <= len(caplog.records) < 20

    def test_a_request_that_is_too_long_is_not_sent(self, tmp_path: Path) -> None:
        with running(Pair("file", tmp_path)) as pair:
            client = pair.client()
            assert isinstance(client, hangwatch.FileTimerClient)
            with pytest.raises(RuntimeError, match="longer than 4096"):
                client._send_request(FileTimerRequest(1, "x" * 5000, 1.0, signal.SIGKILL))

    @pytest.mark.parametrize("scope", ["x" * 9000, "ü" * 9000, "💥" * 9000])
    def test_a_scope_of_any_length_fits(self, queue: fifo.FifoRequestQueue, scope: str) -> None:
        client = hangwatch.FileTimerClient(queue.path)
        with hangwatch.expires(60, scope, client):
            (acquired,) = queue.get(9, 0)
        (released,) = queue.get(9, 0)
        assert acquired.scope_id == released.scope_id
        with hangwatch.expires(60, scope + "y", client):
            (other,) = queue.get(9, 0)
        assert other.scope_id != acquired.scope_id
