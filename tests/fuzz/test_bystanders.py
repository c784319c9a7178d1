"""Hostile pages and hellos name other processes: nobody but the peer is ever signalled."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.nursery import Worker
from support.processes import is_alive
from support.sizes import Size, short_and_long
from support.watchers import CONNECT, StartWatcher, wait_until

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
with hangwatch.expires(after=1000, scope="healthy"):
    print("ready", flush=True)
    input()
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""

# Every slot is overdue. Its threads are a bystander's; its policy is anything.
HOSTILE = """
import json, os, random, signal, socket, struct, sys, time
address, seed, numbers, file = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
sys.path[:0] = json.loads(sys.argv[5])
from hangwatch.page import layout
from hangwatch.worker.connection import RING
from support.pages import write_details
from support.raw_worker import connect, hello, memfd
rng = random.Random(seed)
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, 40):
    signal.signal(number, lambda *_: None)
pages, stacks = memfd(), os.memfd_create("stacks")
memory = memoryview(bytearray(layout.PAGE_BYTES))
memory[:layout.HEADER_BYTES] = os.pread(pages, layout.HEADER_BYTES, 0)
slots = 8
soft = seed % 3 == 0
words = memory.cast("d")
words[layout.SLOTS_IN_USE] = slots
words[layout.RAISE_SIGNAL] = 40.0 if soft else rng.choice([0.0, 10.0, 12.5, 1e300])
claimed = rng.choice(numbers)  # is the main thread's number, if one believes it
theirs = [*numbers, claimed, claimed, claimed, os.getpid(), 0, 2**63]
for index in range(slots):
    flags = 2 if soft else rng.choice([0, 1, 2, 3, 7, 2**32 - 1])
    details = layout.SlotDetails(
        limit=rng.choice([1.0, 1e308, -1.0]),
        ident=rng.choice(theirs),
        native_id=claimed if soft else rng.choice(theirs),
        thread_name="MainThread",
        scope="hostile",
    )
    write_details(memory, index, details)
    signal_number = rng.choice([0, -1, 9, 10, 12, 15, 19, 40, 64, 65, -2**31])
    struct.pack_into("=Ii", memory, layout.slot_byte(index) + 48, flags, signal_number)
    grace = 0.2 if flags == 2 else rng.choice([0.0, -1.0, 0.1, float("nan")])
    struct.pack_into("=d", memory, layout.slot_byte(index) + 72, grace)
    words[layout.deadline_word(index) + layout.ENTRY] = 1.0
    words[layout.deadline_word(index)] = time.monotonic() - rng.random()
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


@short_and_long
@pytest.mark.parametrize("on_expiry", ["reap", "report"])
def test_bystanders_are_not_signalled(
    start_watcher: StartWatcher,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    on_expiry: str,
    size: Size,
) -> None:
    watcher = start_watcher(on_expiry=on_expiry, grace=0.3)

    def start(*arguments: str) -> Worker:
        return watcher.worker(*arguments, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    bystanders = [start(BYSTANDER, kind) for kind in ("blocks", "catches")]
    healthy = start(CONNECT + HEALTHY)
    numbers = [number for one in bystanders for number in json.loads(one.read_line())]
    assert healthy.read_line() == "ready"
    numbers.append(healthy.pid)
    file = tmp_path / "theirs"
    file.write_text("a bystander's")
    path = json.dumps([entry for entry in sys.path if entry.endswith("tests")])
    first = 0 if on_expiry == "reap" else 100
    hostiles = [
        start(HOSTILE, watcher.address, str(seed), json.dumps(numbers), str(file), path)
        for seed in range(first, first + size.of(5, 12, 36))
    ]
    try:
        assert all(one.read_line() == "welcome" for one in hostiles)
        wanted = {one.pid for one in hostiles}
        wait_until(
            lambda: {report["worker"]["pid"] for report in watcher.reports()} >= wanted,
            "an incident of each hostile worker",
        )
        for one in (*bystanders, healthy):
            assert is_alive(one.pid)
        if on_expiry == "reap":
            healthy.write_line()
            assert healthy.wait() == -signal.SIGTERM, "and is still watched"
            assert watcher.report(pid=healthy.pid)["scope"]["name"] == "at last"
        for one in bystanders:
            one.write_line()
            assert json.loads(one.read_line()) == [[], []], "a bystander was signalled"
            assert one.wait() == 0
        assert file.read_text() == "a bystander's"
        missing = [why for report in watcher.reports() for why in report["missing"]]
        assert "evidence: gathering it failed" not in missing
        told = {report["worker"]["pid"] for report in watcher.reports()}
        assert told <= {*wanted, healthy.pid}, "whom a report is about is never the page's word"
    finally:
        for one in (*hostiles, *bystanders, healthy):
            one.kill()
            one.communicate()
    log = capfd.readouterr().err
    assert not re.search(r"the watcher \(process \d+\) died", log)
