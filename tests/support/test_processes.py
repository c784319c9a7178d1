"""What leaks is found, in real processes; and who has a SIGKILL counts as killed."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from support.nursery import nursery
from support.processes import Watched, errors_in, fork, held_by, is_alive, left_below_us
from support.watchers import wait_until

LEAKS = """
import os, sys, threading, time
print("ready", flush=True)
sys.stdin.readline()
what = sys.argv[1]
if what == "descriptor": os.dup(0)
if what == "memfd": os.memfd_create("leaked")
if what == "thread": threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("nothing", (0, 0, 0)),
        ("descriptor", (1, 0, 0)),
        ("memfd", (1, 1, 0)),
        ("thread", (0, 0, 1)),
    ],
)
def test_what_a_process_leaks_is_counted(what: str, more: tuple[int, int, int]) -> None:
    with nursery().fork(LEAKS, what, stdin=subprocess.PIPE) as worker:
        worker.read_line()
        (before,) = held_by(worker.pid)
        worker.write_line()
        worker.read_line()
        (after,) = held_by(worker.pid)
        worker.write_line()
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == more
    assert held_by(worker.pid) == [], "who is no more holds nothing"


def test_a_process_that_is_left_behind_is_found() -> None:
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        wait_until(lambda: left_below_us().get(sleeper.pid) == "sleep", "it is found")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert sleeper.pid not in left_below_us()
    assert not is_alive(sleeper.pid)


def test_errors_in_a_log_are_found() -> None:
    script = "import logging\ntry: 1 / 0\nexcept Exception: logging.exception('hangwatch: no')"
    _, caught = nursery().fork(script, stderr=subprocess.PIPE).communicate()
    assert errors_in(f"before\n{caught}after\n") == ["ZeroDivisionError: division by zero"]
    crash = "import faulthandler\nfaulthandler.enable()\nfaulthandler._sigsegv()"
    _, crashed = nursery().fork(crash, stderr=subprocess.PIPE).communicate()
    assert len(errors_in(f"before\n{crashed}after\n")) == 1
    assert errors_in("hangwatch: WARNING: all is well\n") == []


def test_who_was_killed_and_is_not_dead_yet_counts_as_killed() -> None:
    child = Watched(fork(signal.pause))
    assert not child.is_killed()
    child.signal(signal.SIGKILL)
    assert child.is_killed()
    os.waitpid(child.pid, 0)
    assert child.is_killed()
    child.close()
