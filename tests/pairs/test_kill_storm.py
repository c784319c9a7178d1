"""The kill storm of `make stress-kills`, a short one; and that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.nursery import LIMIT
from support.sizes import Size, short_and_long

_TESTS = str(Path(__file__).parents[1])

# A client whose timers nobody gets to know of.
NEVER_ARMS = """
from hangwatch import *
import hangwatch

class LocalTimerClient(hangwatch.LocalTimerClient):
    def acquire(self, scope_id, expiration_time): pass
    def release(self, scope_id): pass
"""
# A client that shares a lock with all others, as the senders of a multiprocessing queue do.
LOCKS = """
from hangwatch import *
import multiprocessing
import hangwatch

lock = multiprocessing.get_context("fork").Lock()

class LocalTimerClient(hangwatch.LocalTimerClient):
    def acquire(self, scope_id, expiration_time):
        with lock:
            super().acquire(scope_id, expiration_time)

    def release(self, scope_id):
        with lock:
            super().release(scope_id)
"""
# A client of which a worker dies that overran nothing, by SIGKILL.
KILLS_ANYBODY = """
from hangwatch import *
import os, signal
import hangwatch

class LocalTimerClient(hangwatch.LocalTimerClient):
    def release(self, scope_id):
        super().release(scope_id)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def storm(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    paths = [_TESTS, path, os.environ.get("PYTHONPATH")]
    return subprocess.run(
        [sys.executable, "-m", "stress.kill_storm", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


@short_and_long
def test_no_survivor_is_blocked_or_unprotected(size: Size) -> None:
    kills = size.of("40", "600", "2000")
    result = storm(kills, "--patience", str(LIMIT))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "victims killed" in result.stdout


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (NEVER_ARMS, "hangs was ended"),
        (LOCKS, "stood still for"),
        (KILLS_ANYBODY, "was never overdue then"),
    ],
    ids=["never arms", "locks", "kills anybody"],
)
def test_a_client_that_breaks_its_promise_is_found_out(
    module: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(module)
    broken = ["--implementation", "broken", "--road", "native", "--patience", "3"]
    result = storm("2000", *broken, path=str(tmp_path))
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]
    assert complaint in result.stdout
