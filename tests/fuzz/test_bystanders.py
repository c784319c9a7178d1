"""Hostile pages and hellos name other processes: nobody but the peer is ever signalled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import is_alive
from support.watchers import RunningWatcher, StartWatcher, wait_until

HOSTILES = 12

# One blocks every signal, and what it was sent stays pending; it would not be signalled by who
# looks at masks first. The other catches all of them.
BYSTANDER = """
import json, os, signal, sys, threading
caught = []
blocks = sys.argv[1] == "blocks"
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    if not blocks and number != signal.SIGCHLD:
        signal.signal(number, lambda number, frame: caught.append(number))
if blocks:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
print(json.dumps([os.getpid(), thread.native_id]), flush=True)
sys.stdin.readline()
pending = {
    line for task in os.listdir("/proc/self/task")
    for line in open(f"/proc/self/task/{task}/status").read().splitlines()
    if line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16)
}
end.set()
print(json.dumps([caught, sorted(pending)]), flush=True)
"""

HEALTHY = """
import time, hangwatch
with hangwatch.expires(after=60, scope="healthy"):
    print("ready", flush=True)
    input()
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""

# Every slot is overdue. Its threads are a bystander's; its wishes are anything.
HOSTILE = """
import json, os, random, signal, socket, struct, sys, time
address, seed, numbers, file = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
sys.path[:0] = json.loads(sys.argv[5])
from hangwatch import page
from hangwatch.worker.connection import RING
from support.raw_worker import connect, hello, memfd
rng = random.Random(seed)
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, 40):
    signal.signal(number, lambda *_: None)
pages, stacks = memfd(), os.memfd_create("stacks")
memory = memoryview(bytearray(page.PAGE_BYTES))
memory[:page.HEADER_BYTES] = os.pread(pages, page.HEADER_BYTES, 0)
slots = 8
soft = seed % 3 == 0
words = memory.cast("d")
words[page.SLOTS_IN_USE] = slots
words[page.RAISE_SIGNAL] = 40.0 if soft else rng.choice([0.0, 10.0, 12.5, 1e300])
claimed = rng.choice(numbers)  # is the main thread's number, if one believes it
theirs = [*numbers, claimed, claimed, claimed, os.getpid(), 0, 2**63]
for index in range(slots):
    flags = 2 if soft else rng.choice([0, 1, 2, 3, 7, 2**32 - 1])
    details = page.SlotDetails(
        limit=rng.choice([1.0, 1e308, -1.0]),
        ident=rng.choice(theirs),
        native_id=claimed if soft else rng.choice(theirs),
        thread_name="MainThread",
        scope="hostile",
        flags=flags,
        signal=rng.choice([0, -1, 9, 10, 12, 15, 19, 40, 64, 65, -2**31]),
        grace=0.2 if flags == 2 else rng.choice([0.0, -1.0, 0.1, float("nan")]),
    )
    page.write_details(memory, index, details, keep_end=True)
    page.write_enclosing(memory, index, rng.choice([None, None, index]), 1.0)
    words[page.deadline_word(index) + page.ENTRY] = 1.0
    words[page.deadline_word(index)] = time.monotonic() - rng.random()
os.pwrite(pages, memory, 0)
says = hello(
    page_fd=pages,
    pid=claimed,
    main_ident=rng.choice(numbers),
    error_file=file,
    stacks={"fd": stacks, "own": rng.choice([10, 12, 15, 9, 1, 65, 40]),
            "all": rng.choice([10, 12, 15, 9, 19, 40])},
)
with connect(address) as connection:
    socket.send_fds(connection, [says], [pages, stacks])
    connection.recv(4096)
    print("welcome", flush=True)
    while True:
        connection.send(RING)
        time.sleep(0.05)
"""


def _start(watcher: RunningWatcher, *arguments: str) -> subprocess.Popen[str]:
    return watcher.worker(*arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("on_expiry", ["reap", "report"])
def test_bystanders_are_not_signalled(
    start_watcher: StartWatcher, tmp_path: Path, on_expiry: Any
) -> None:
    watcher = start_watcher(on_expiry=on_expiry, grace=0.3)
    watching = watcher.pid
    bystanders = [_start(watcher, BYSTANDER, kind) for kind in ("blocks", "catches")]
    healthy = _start(watcher, HEALTHY)
    numbers = [number for one in bystanders for number in json.loads(_line(one))]
    assert _line(healthy) == "ready\n"
    numbers.append(healthy.pid)
    file = tmp_path / "theirs"
    file.write_text("a bystander's")
    path = json.dumps([entry for entry in sys.path if entry.endswith("tests")])
    seeds = range(HOSTILES) if on_expiry == "reap" else range(100, 100 + HOSTILES)
    hostiles = [
        _start(watcher, HOSTILE, watcher.address, str(seed), json.dumps(numbers), str(file), path)
        for seed in seeds
    ]
    try:
        assert all(_line(one) == "welcome\n" for one in hostiles)
        wanted = {one.pid for one in hostiles}
        wait_until(
            lambda: {report["worker"]["pid"] for report in watcher.reports()} >= wanted,
            "an incident of each hostile worker",
        )
        for one in (*bystanders, healthy):
            assert is_alive(one.pid)
            assert one.stdin is not None
        if on_expiry == "reap":
            _end(healthy)
            assert healthy.wait(20) == -signal.SIGTERM, "and is still watched"
            assert watcher.report(pid=healthy.pid)["scope"]["name"] == "at last"
        for one in bystanders:
            _end(one)
            assert json.loads(_line(one)) == [[], []], "a bystander was signalled"
            assert one.wait(20) == 0
        assert watcher.pid == watching, "the watcher lives"
        assert file.read_text() == "a bystander's"
        missing = [why for report in watcher.reports() for why in report["missing"]]
        assert "evidence: gathering it failed" not in missing
        told = {report["worker"]["pid"] for report in watcher.reports()}
        assert told <= {*wanted, healthy.pid}, "whom a report is about is never the page's word"
    finally:
        for one in (*hostiles, *bystanders, healthy):
            one.kill()
            one.communicate()


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    process.stdin = None
