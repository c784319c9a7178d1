"""The kill storm of `make stress-kills`, a short one; and that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def storm(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    paths = [_TESTS, path, os.environ.get("PYTHONPATH")]
    return subprocess.run(
        [sys.executable, "-m", "stress.kill_storm", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("road", ["native", "legacy"])
def test_no_survivor_is_blocked_or_unprotected(road: str) -> None:
    result = storm("150", "--road", road)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "victims killed" in result.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (NEVER_ARMS, "lives 5 s after its deadline"),
        (LOCKS, "has been blocked for 5 s"),
    ],
    ids=["never arms", "locks"],
)
def test_a_client_that_breaks_its_promise_is_found_out(
    module: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(module)
    result = storm("2000", "--implementation", "broken", "--road", "native", path=str(tmp_path))
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]
    assert complaint in result.stdout
