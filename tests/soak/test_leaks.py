"""What leaks is found: in real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from soak.leaks import errors_in, held_by, left_below_us
from support.processes import is_alive
from support.watchers import wait_until

LEAKS = """
import os, subprocess, sys, threading, time
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
    process = subprocess.Popen(
        [sys.executable, "-c", LEAKS, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    (before,) = held_by(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    (after,) = held_by(process.pid)
    process.communicate("\n")
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == more
    assert held_by(process.pid) == [], "who is no more holds nothing"


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
    caught = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert errors_in(f"before\n{caught.stderr}after\n") == ["ZeroDivisionError: division by zero"]
    crash = "import faulthandler\nfaulthandler.enable()\nfaulthandler._sigsegv()"
    crashed = subprocess.run([sys.executable, "-c", crash], capture_output=True, text=True)
    assert len(errors_in(f"before\n{crashed.stderr}after\n")) == 1
    assert errors_in("hangwatch: WARNING: all is well\n") == []
