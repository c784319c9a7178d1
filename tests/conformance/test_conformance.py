"""Every row of the contract's table: ours keeps the promise, and PyTorch still breaks it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.contract import CONTROL
from conformance.row import BOTH, Row
from conformance.table import CASES
from conformance.theatre import OURS, TORCH, Theatre

every_case = pytest.mark.parametrize(
    ("row", "pair"), [pytest.param(*case, id=f"{case[0].id}-{case[1]}") for case in CASES]
)
# So often may PyTorch keep a promise by chance.
_CHANCES = 3
both_pairs = pytest.mark.parametrize("pair", BOTH)


@pytest.fixture(scope="module")
def ours() -> Iterator[Theatre]:
    with Theatre(OURS) as theatre:
        yield theatre


@pytest.fixture(scope="module")
def pytorch() -> Iterator[Theatre]:
    with Theatre(TORCH) as theatre:
        yield theatre


@every_case
def test_ours_keeps_the_promise(row: Row, pair: str, ours: Theatre) -> None:
    outcome = ours.play(row, pair)
    assert outcome.holds, outcome.figure


@pytest.mark.interop
@every_case
def test_pytorch_still_breaks_it(row: Row, pair: str, pytorch: Theatre) -> None:
    # A race that is lost may be won once, on a machine that is busy at the wrong moment.
    for _ in range(_CHANCES):
        outcome = pytorch.play(row, pair)
        if not outcome.holds:
            break
    else:
        pytest.fail(
            f"PyTorch no longer breaks {row.id} ({outcome.figure}): "
            "update docs/migrating-from-torch.md"
        )


@both_pairs
def test_ours_kills_a_plain_hang(pair: str, ours: Theatre) -> None:
    outcome = ours.play(CONTROL, pair)
    assert outcome.holds, outcome.figure


@pytest.mark.interop
@both_pairs
def test_pytorch_kills_a_plain_hang(pair: str, pytorch: Theatre) -> None:
    outcome = pytorch.play(CONTROL, pair)
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
