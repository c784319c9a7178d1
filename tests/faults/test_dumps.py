"""Stacks are asked of workers that recover at that moment: `make stress-dumps`, a short one."""

from __future__ import annotations

from rich.progress import Progress

from stress import dumps


def test_no_healthy_worker_crashes_when_it_is_asked_for_its_stacks() -> None:
    tally = dumps.stress(300, Progress(disable=True))
    assert tally.crashed == []
    assert tally.answered > 100
    assert tally.answered + tally.recovered <= tally.asked
