"""What a block costs: time against an empty `with` of a Python class, and system calls.

All variants take turns in one run, so that a noisy machine hits them alike; each counts
its best turn. A real watcher watches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import hangwatch

PAIRS = 5_000
TURNS = 100
COUNTED_PAIRS = 50_000
GOAL_NAMED, GOAL_DEFAULT = 4.0, 1.3
_MARK = "/mark-of-the-benchmark"


class Empty:
    """The least that a context manager written in Python can do."""

    def __enter__(self) -> Empty:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


def empty(pairs: int) -> None:
    for _ in range(pairs):
        with Empty():
            pass


def named(pairs: int) -> None:
    for _ in range(pairs):
        with hangwatch.expires(after=60, scope="x"):
            pass


def default(pairs: int) -> None:
    for _ in range(pairs):
        with hangwatch.expires(after=60):
            pass


def best_seconds(variants: list[Callable[[int], None]]) -> dict[str, float]:
    """Return each variant's best time for one pair."""
    best = {variant.__name__: float("inf") for variant in variants}
    for _ in range(TURNS):
        for variant in variants:
            began = time.perf_counter()
            variant(PAIRS)
            took = (time.perf_counter() - began) / PAIRS
            best[variant.__name__] = min(best[variant.__name__], took)
    return best


def count_system_calls() -> int | None:
    """Count the system calls of pairs between two marks, with strace; None without it."""
    if shutil.which("strace") is None:
        return None
    with tempfile.NamedTemporaryFile() as log:
        subprocess.run(
            ["strace", "-o", log.name, sys.executable, __file__, "--between-marks"], check=True
        )
        calls = [line.decode() for line in log]
    begin, end = (n for n, call in enumerate(calls) if _MARK in call)
    return end - begin - 1


def run_between_marks() -> None:
    """Run pairs after a warm-up: connect, ring once, and let Python get its memory."""
    for variant in (named, default):
        variant(1000)
    time.sleep(1)  # while the watcher looks at the page, everybody rings
    os.access(_MARK, os.F_OK)
    for variant in (named, default):
        variant(COUNTED_PAIRS // 2)
    os.access(_MARK, os.F_OK)


def main() -> int:
    """Print the figures; return 1 if a system call was made."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--system-calls", action="store_true", help="look at these alone")
    options.add_argument("--between-marks", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.between_marks:
        run_between_marks()
        return 0
    with hangwatch.serve(report_dir=None):
        calls = count_system_calls()
        if not chosen.system_calls:
            best = best_seconds([empty, named, default])
            for name, seconds in best.items():
                print(f"{name:8} {seconds * 1e9:6.0f} ns")
            ratio = best["named"] / best["empty"]
            extra = best["default"] / best["named"]
            print(f"a named block costs {ratio:.2f} empty ones (goal: at most {GOAL_NAMED:g})")
            print(f"a default scope costs {extra:.2f} named ones (goal: at most {GOAL_DEFAULT:g})")
    shown = "not counted: install strace" if calls is None else calls
    print(f"system calls in {COUNTED_PAIRS} pairs: {shown}")
    return 1 if calls else 0


if __name__ == "__main__":
    raise SystemExit(main())
