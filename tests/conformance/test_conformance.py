"""Every row of the contract's table: ours keeps the promise, and PyTorch still breaks it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conformance.contract import CASES, CONTROL
from conformance.row import BOTH, OURS, TORCH, Row
from conformance.theatre import play

every_case = pytest.mark.parametrize(
    ("row", "pair"), [pytest.param(*case, id=f"{case[0].id}-{case[1]}") for case in CASES]
)
both_pairs = pytest.mark.parametrize("pair", BOTH)
# In one of so many plays who breaks a promise by chance must break it.
_PLAYS = 3


@every_case
def test_ours_keeps_the_promise(row: Row, pair: str) -> None:
    outcome = play(OURS, row, pair)
    assert outcome.holds, outcome.figure


@pytest.mark.interop
@every_case
def test_pytorch_still_breaks_it(row: Row, pair: str) -> None:
    outcomes = [play(TORCH, row, pair) for _ in range(_PLAYS if row.by_chance else 1)]
    assert any(not outcome.holds for outcome in outcomes), (
        f"PyTorch no longer breaks {row.id} ({outcomes[-1].figure}): "
        "update docs/migrating-from-torch.md"
    )


@both_pairs
def test_ours_kills_a_plain_hang(pair: str) -> None:
    outcome = play(OURS, CONTROL, pair)
    assert outcome.holds, outcome.figure


@pytest.mark.interop
@both_pairs
def test_pytorch_kills_a_plain_hang(pair: str) -> None:
    outcome = play(TORCH, CONTROL, pair)
    assert outcome.holds, outcome.figure


_CLOCK_SEEN = """
import subprocess, sys
from conformance.clock import SteppedClock
clock = SteppedClock(sys.argv[1])
clock.install()
clock.step(-3600)
subprocess.run([sys.executable, "-P", "-c", "import time; print(time.time())"], check=True)
"""


def test_a_stepped_clock_is_that_of_whatever_a_server_starts(tmp_path: Path) -> None:
    # What row wall-clock rests upon: a watcher, too, sees the step.
    started = subprocess.run(
        [sys.executable, "-c", _CLOCK_SEEN, str(tmp_path / "clock")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert -3700 < float(started.stdout) - time.time() < -3500
