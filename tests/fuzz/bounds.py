"""What every target holds to, whatever the input."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hangwatch.evidence import error_file, report
from hangwatch.evidence.model import Action, Case, Evidence, Outcome, Report

ANYWHERE = 0.3
"""Seconds of CPU that no machine is too fast or too slow for."""
LOOPS = 30
"""What an input may cost beyond that, in what a million turns of an empty loop take."""
MOST_KILOBYTES = 64 << 10

Check = Callable[[bytes], None]


def in_time(check: Check, data: bytes) -> None:
    """Check one input, and that it did not cost too much CPU.

    What is linear takes ten loops at most, what is not, a hundred and more.
    """
    before = time.process_time()
    check(data)
    took = time.process_time() - before
    if took > ANYWHERE:
        loops = took / _loop()
        assert loops < LOOPS, f"{took:.1f} s of CPU, {loops:.0f} loops, for {len(data)} bytes"


def _loop() -> float:
    before = time.process_time()
    for _ in range(1_000_000):
        pass
    return time.process_time() - before


def in_memory(check: Check, data: bytes) -> None:
    """Check one input, and that it did not take too much memory.

    Source: proc(5), 5 written to clear_refs begins VmHWM, the peak, anew.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmHWM")
    check(data)
    took = _memory("VmHWM") - before
    assert took < MOST_KILOBYTES, f"{took} kB for {len(data)} bytes"


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


def strict(text: str | bytes) -> Any:
    """Read JSON as strict readers do, who know no NaN and no infinity."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"no JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


def check_report(case: Case, evidence: Evidence) -> dict[str, Any]:
    """See that a report can be written in every form that it has; return its JSON."""
    whole = Report(Outcome.REAPED, case, evidence, [Action("SIGKILL", 0.05, "sent")])
    text = report.to_text(whole)
    assert all(line.isprintable() for line in text.split("\n")), "it would steer a terminal"
    text.encode("utf-8", "backslashreplace")
    strict(error_file.content_of(case, evidence))
    strict(json.dumps(report.facts(whole, None)))
    # As `publish` writes it.
    written: dict[str, Any] = strict(
        report.to_json(whole).encode("utf-8", "backslashreplace").decode()
    )
    return written
