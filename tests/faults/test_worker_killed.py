"""A worker is killed at every step of connecting and of arming: nobody else notices."""

from __future__ import annotations

import random
import re
import signal
import subprocess

import pytest

from support.nursery import LIMIT
from support.processes import open_files
from support.sizes import Size, short_and_long
from support.watchers import StartWatcher, wait_until

# Forks itself for each step, so that what is imported already is no step. A line of connecting
# is a step; of arming it is an instruction of the bytecode.
DIES_AT_STEPS = """
import os, signal, sys, threading, hangwatch
from hangwatch import wire, linux
from hangwatch.worker import client, connection, expiration
source = os.path.dirname(hangwatch.__file__)
kind, first, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
linux.fence()

def die_at(step):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(source):
            return None
        if kind == "arm":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event in ("line", "opcode"):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    if kind == "arm":
        with hangwatch.expires(60, "connect"): pass
    sys.settrace(trace)
    with hangwatch.expires(60, "outer"):
        with hangwatch.expires(60): pass
    sys.settrace(None)

step = first
while True:
    child = os.fork()
    if child == 0:
        die_at(step)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    step += every
print(step)
"""

HEALTHY = """
import time, hangwatch
with hangwatch.expires(after=1000, scope="healthy"):
    print("in", flush=True)
    input()
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""


@pytest.mark.timeout(900)
@short_and_long
@pytest.mark.parametrize("kind", ["connect", "arm"])
def test_a_worker_dies_at_each_step(
    start_watcher: StartWatcher, size: Size, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The short form takes every 16th step; at which it begins is random."""
    watcher = start_watcher()
    healthy = watcher.connected_worker(HEALTHY, stdin=subprocess.PIPE)
    assert healthy.read_line() == "in"
    before = open_files(watcher.keeper_pid), open_files(watcher.pid)
    every = size.of(16, 4, 1)
    first = random.randint(1, every)
    dying = watcher.worker(DIES_AT_STEPS, kind, str(first), str(every))
    out, _ = dying.communicate(timeout=size.of(1, 2, 6) * LIMIT)  # a fork for each step
    assert dying.returncode == 0
    assert int(out) > 150, "there are so many steps"
    wait_until(
        lambda: (open_files(watcher.keeper_pid), open_files(watcher.pid)) == before,
        "nothing of them is left open",
    )
    assert watcher.reports() == [], "who is dead has not expired"
    healthy.communicate("\n")
    assert healthy.returncode == -signal.SIGKILL, "and watches"
    watcher.server.stop()
    log = capfd.readouterr().err
    assert not re.search(r"the watcher \(process \d+\) died", log)
    assert "Traceback" not in log
