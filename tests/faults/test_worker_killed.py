"""A worker is killed at every step of connecting and of arming: nobody else notices."""

from __future__ import annotations

import subprocess

import pytest

from support.processes import open_files
from support.watchers import StartWatcher, wait_until

# Forks itself for each step, so that what is imported already is no step. A line of connecting
# is a step; of arming it is an instruction of the bytecode.
DIES_AT_EACH_STEP = """
import os, signal, sys, threading, hangwatch
from hangwatch import wire, linux
from hangwatch.worker import expiration
source = os.path.dirname(hangwatch.__file__)
kind = sys.argv[1]
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

step = 0
while True:
    step += 1
    child = os.fork()
    if child == 0:
        die_at(step)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(step)
"""

HEALTHY = """
import time, hangwatch
with hangwatch.expires(after=60, scope="healthy"):
    print("in", flush=True)
    input()
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""


@pytest.mark.parametrize(("kind", "steps"), [("connect", 150), ("arm", 150)])
def test_a_worker_dies_at_each_step(
    start_watcher: StartWatcher, kind: str, steps: int, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE)
    assert healthy.stdout is not None
    healthy.stdout.readline()
    before = open_files(watcher.keeper_pid), open_files(watcher.pid)
    pid = watcher.pid
    dying = watcher.worker(DIES_AT_EACH_STEP, kind)
    out, _ = dying.communicate(timeout=50)
    assert dying.returncode == 0
    assert int(out) > steps
    wait_until(
        lambda: (open_files(watcher.keeper_pid), open_files(watcher.pid)) == before,
        "nothing of them is left open",
    )
    assert watcher.pid == pid, "the watcher lives"
    assert watcher.reports() == [], "who is dead has not expired"
    healthy.communicate("\n", timeout=20)
    assert healthy.returncode == -9, "and watches"
    watcher.server.stop()
    assert "Traceback" not in capfd.readouterr().err
