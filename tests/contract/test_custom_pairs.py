"""The example of docs/custom-pairs.md: what it prints, and what its page says of it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hangwatch import TimerRequest
from support.namespaces import run_alone
from support.nursery import LIMIT, Worker, nursery
from support.processes import is_alive, open_files
from support.watchers import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "datagram_pair.py"
PAGE = ROOT / "docs" / "custom-pairs.md"

PRELUDE = f"""
import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r})
import ctypes, json, os, signal, socket, struct, time
from datagram_pair import *
"""
WORKER = f"""{PRELUDE}
client = DatagramTimerClient(sys.argv[1])
def say(what): print(what, flush=True)
def wait(): say("ready"); sys.stdin.read()
"""


def load_example() -> Any:
    specification = importlib.util.spec_from_file_location("datagram_pair", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


pair = load_example()


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Any]:
    queue = pair.DatagramRequestQueue(str(tmp_path / "timers"))
    yield queue
    drop(queue.get(queue.size(), 0))
    queue.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """Return a client in this process; its timers are released in the end."""
    client = pair.DatagramTimerClient(str(tmp_path / "timers"))
    yield client
    for _, _, scope in list(client._flags):
        client.release(scope)
    client.close()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Any]:
    """Start workers that have a client; they end with the test."""
    running: list[Worker] = []

    def start(script: str) -> Worker:
        place, pipe = str(tmp_path / "timers"), subprocess.PIPE
        worker = nursery().fork(WORKER + script, place, stdin=pipe, stderr=pipe)
        running.append(worker)
        return worker

    yield start
    for worker in running:
        worker.kill()
        worker.wait()
        worker.close()


def drop(requests: list[TimerRequest]) -> None:
    for request in requests:
        os.close(request.flag)  # type: ignore[attr-defined]


def expect(worker: Worker, line: str) -> None:
    assert worker.stdout is not None
    assert worker.stderr is not None
    said = worker.stdout.readline()
    assert said == f"{line}\n", said + worker.stderr.read()


def test_the_example_tells_how_it_went() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "the worker that left its block in time ended with status 0\n"
        "the worker that hung was ended by signal 9\n"
    )
    assert re.fullmatch(r"worker \d+ overran \['work'\]: reaping it\n", result.stderr)
    printed = re.sub(r"worker \d+ overran", "worker 6408 overran", result.stderr) + result.stdout
    assert f"$ python examples/{EXAMPLE.name}\n{printed}```" in PAGE.read_text()


def test_what_the_page_quotes_stands_in_the_example() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 4
    source = EXAMPLE.read_text()
    for block in blocks:
        indented = [textwrap.indent(block, " " * depth) for depth in range(0, 24, 4)]
        assert any(f"\n{text}" in source for text in indented), block


def test_get_returns_at_once_as_many_as_size_counted(queue: Any, workers: Any) -> None:
    worker = workers("""
say("ready")
while True:
    client.acquire("scope", time.time() + 600)
    client.release("scope")
    client._socket.sendto(b"none that counts", sys.argv[1])
""")
    expect(worker, "ready")
    seen = 0
    until = time.monotonic() + LIMIT
    while seen < 2000:
        size = queue.size()
        taken = queue.get(size, 0)
        assert len(taken) == size
        seen += size
        drop(taken)
        assert time.monotonic() < until


def test_get_takes_at_most_so_many_and_what_there_is(queue: Any, client: Any) -> None:
    for number in range(5):
        client.acquire(f"scope {number}", 2e9 + number)
    first, rest, nothing = queue.get(2, 60), queue.get(10, 0.01), queue.get(1, 0.01)
    mine = [TimerRequest(os.getpid(), f"scope {number}", 2e9 + number) for number in range(5)]
    assert [*first, *rest] == mine
    assert len(first) == 2
    assert nothing == []
    drop([*first, *rest])


def test_a_bad_request_is_dropped_alone_with_its_descriptors(
    queue: Any, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what other tests left is not what is counted
    before = open_files(os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        good = json.dumps({"scope": "x", "until": 2e9}).encode()
        for data, descriptors in [
            (b"\xff", [0]),
            (b"[]", [0]),
            (b"", []),
            (b'{"scope": "x", "until": "soon"}', [0]),
            (good, []),
            (good, [0, 0]),
        ]:
            value = struct.pack(f"{len(descriptors)}i", *descriptors)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, value)] if descriptors else []
            sender.sendmsg([data], rights, 0, str(tmp_path / "timers"))
    client.acquire("good", 2e9)
    (request,) = queue.get(queue.size(), 0)
    assert request.scope_id == "good"
    assert len(caplog.records) == 6
    drop([request])
    client.release("good")
    assert open_files(os.getpid()) == before


def test_the_hung_worker_is_killed_and_the_one_that_left_is_not(queue: Any, workers: Any) -> None:
    left = workers("""
with expires(1, "outer", client):
    with expires(1, "inner", client): pass
    with expires(1, "inner", client): pass
wait()
""")
    expect(left, "ready")
    hung = workers("""
with expires(1, "work", client):
    say("ready")
    ctypes.PyDLL(None).pause()
""")
    server = pair.DatagramTimerServer(queue, 0.05)
    server.start()
    expect(hung, "ready")
    assert hung.wait(LIMIT) == -9
    # The time of the one that left was up before that of the one that hung.
    assert is_alive(left.pid)
    wait_until(lambda: server._timers == {left.pid: []}, "that only the living are held")
    server.stop()


def test_a_slow_server_holds_nobody_up_and_kills_nobody_that_left(queue: Any, workers: Any) -> None:
    # Nobody takes from the socket, which is full before long.
    worker = workers("""
for number in range(5000):
    with expires(0.001, "brief", client): pass
with expires(600, "unwatched", client): say("ready")
wait()
""")
    expect(worker, "ready")
    expect(worker, "ready")
    server = pair.DatagramTimerServer(queue, 0.01)
    waiting = queue.size()
    assert waiting > 1
    for _ in range(3):
        server._run_watchdog()
    assert is_alive(worker.pid)
    assert server._timers == {worker.pid: []}
    _, said = worker.communicate()
    assert said == "the server has no room: 'brief' is not watched\n"
    assert worker.returncode == 0


def test_a_forked_child_does_not_release_its_parent_s_timer(queue: Any, workers: Any) -> None:
    worker = workers("""
with expires(0.5, "parent", client):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        ctypes.PyDLL(None).pause()
os._exit(0)
""")
    server = pair.DatagramTimerServer(queue, 0.05)
    server.start()
    assert worker.wait(LIMIT) == -9
    server.stop()


def test_without_a_server_the_block_is_not_entered(workers: Any) -> None:
    worker = workers("""
try:
    with expires(60, "work", client): say("entered")
except OSError as error:
    say(type(error).__name__)
assert not any(client._flags.values())
""")
    expect(worker, "FileNotFoundError")
    assert worker.wait(LIMIT) == 0


def test_no_request_names_another_process(queue: Any, workers: Any) -> None:
    worker = workers("""
victim = os.getppid()
flag = os.eventfd(0)
names = {name: victim for name in ("pid", "worker_id", "worker")}
data = json.dumps({"scope": "x", "until": 1, **names}).encode()
rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", flag))
client._socket.sendmsg([data], [rights], 0, sys.argv[1])

# Root may, so be no root: capset(2) with nothing in it.
header, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
assert ctypes.CDLL(None).capset(header, nothing) == 0
named = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS,
         struct.pack("iII", victim, os.getuid(), os.getgid()))
try:
    client._socket.sendmsg([data], [rights, named], 0, sys.argv[1])
except PermissionError:
    say("refused")
wait()
""")
    expect(worker, "refused")
    requests = queue.get(queue.size(), 0)
    assert [request.worker_id for request in requests] == [worker.pid]
    drop(requests)


def test_the_server_does_not_end_itself(queue: Any, client: Any) -> None:
    client.acquire("mine", 1.0)
    server = pair.DatagramTimerServer(queue, 0.01)
    server._run_watchdog()
    assert server._timers == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may choose the next process id")
def test_who_gets_a_dead_worker_s_number_is_somebody_else(tmp_path: Path) -> None:
    run_alone(
        PRELUDE
        + """
def worker_300(after):
    # proc_sys_kernel: the next process of this namespace gets the number after it.
    with open("/proc/sys/kernel/ns_last_pid", "w") as last: last.write("299")
    made = os.fork()
    if made == 0:
        DatagramTimerClient(path).acquire("work", time.time() + after)
        signal.pause()
    assert made == 300, made
    while not queue.size(): time.sleep(0.01)
    server._run_watchdog()

path = sys.argv[1]
queue = DatagramRequestQueue(path)
server = DatagramTimerServer(queue, 0.01)
worker_300(after=1)
first = server._timers[300][0].expiration_time
os.kill(300, signal.SIGKILL)
os.waitpid(300, 0)
worker_300(after=600)
time.sleep(max(0, first - time.time()) + 0.01)
server._run_watchdog()
assert len(server._timers[300]) == 1, server._timers
assert os.waitpid(300, os.WNOHANG) == (0, 0), "it was killed for the dead one's timer"
server._timers[300][0].expiration_time = first
server._run_watchdog()
_, status = os.waitpid(300, 0)
assert os.WTERMSIG(status) == signal.SIGKILL
""",
        str(tmp_path / "timers"),
    )


def test_who_does_not_die_is_tried_again_until_its_death_is_confirmed(tmp_path: Path) -> None:
    # The first process of a pid namespace ignores what comes from inside, SIGKILL included.
    run_alone(
        PRELUDE
        + """
assert os.getpid() == 1
path = sys.argv[1]
queue = DatagramRequestQueue(path)
client = DatagramTimerClient(path)
client.acquire("unkillable", time.time() - 1)
mortal = os.fork()
if mortal == 0:
    client.acquire("mortal", time.time() - 1)
    signal.pause()
while queue.size() < 2: time.sleep(0.01)
child = os.fork()
if child == 0:
    attempts = []
    class Server(DatagramTimerServer):
        def _reap_worker(self, worker_id):
            attempts.append((worker_id, super()._reap_worker(worker_id)))
            return attempts[-1][1]
    server = Server(queue, 0.01)
    for _ in range(3):
        server._run_watchdog()
    print(attempts)
    assert sorted(attempts) == [(1, False), (1, False), (1, False), (mortal, True)], attempts
    assert set(server._pidfds) == {1}, server._pidfds
    client._flags.clear()
    sys.stdout.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
client.release("unkillable")
""",
        str(tmp_path / "timers"),
    )
