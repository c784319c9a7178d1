"""`make fuzz SECONDS=30`: every target is fed for so many seconds, two at a time.

An input that fails is kept in `tests/fuzz/corpus/<target>/`, where `make test` meets it from
then on; `python -m fuzz --replay FILE` shows what it does.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fuzz.bounds import in_time
from fuzz.targets import TARGETS

AT_ONCE = 2
_SAY_EVERY = 10.0
_SCRATCH = Path("build/fuzz")


@dataclass
class Run:
    """One target under way."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    say_at: float

    def text(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(errors="replace")

    def inputs(self) -> int:
        """Return how many inputs it has tried, as far as it has said."""
        return max(map(int, re.findall(r"^(?:#|Done )(\d+)", self.text(), re.M)), default=0)


def say(text: str) -> None:
    """Show a line of progress."""
    print(f"fuzz: {text}", file=sys.stderr, flush=True)


def start(name: str, seconds: float, seed: int) -> Run:
    """Start a target in a process of its own."""
    scratch = _SCRATCH / name
    shutil.rmtree(scratch, ignore_errors=True)  # a seed means nothing on top of another run
    scratch.mkdir(parents=True, exist_ok=True)
    log = _SCRATCH / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.engine", name, f"{seconds:g}", f"{seed}", scratch],
            stdout=output,
            stderr=output,
        )
    now = time.monotonic()
    say(f"{name}: begun")
    return Run(name, process, log, now, now + _SAY_EVERY)


def look_after(run: Run) -> bool:
    """Tell of a target's progress now and then; return whether it has ended."""
    now = time.monotonic()
    ended = run.process.poll() is not None
    if now >= run.say_at and not ended:
        run.say_at = now + _SAY_EVERY
        say(f"{run.name}: {now - run.began:.0f} s, {run.inputs()} inputs and more")
    return ended


def outcome(run: Run) -> bool:
    """Say what came of a target; return whether it was well."""
    took = time.monotonic() - run.began
    say(f"{run.name}: {run.inputs()} inputs in {took:.0f} s, {run.inputs() / took:.0f} a second")
    if run.process.returncode == 0:
        return True
    say(f"{run.name}: FAILED; the end of {run.log}:")
    print("\n".join(run.text().splitlines()[-40:]), file=sys.stderr)
    for path in re.findall(r"Test unit written to (\S+)", run.text()):
        say(f"{run.name}: the input is kept; replay it: python -m fuzz --replay {path}")
    return False


def fuzz(names: list[str], seconds: float, seed: int) -> bool:
    """Feed targets, some at once; return whether all were well."""
    waiting, running, well = list(names), list[Run](), True
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(start(waiting.pop(0), seconds, seed))
            time.sleep(0.1)
            for run in [run for run in running if look_after(run)]:
                running.remove(run)
                well &= outcome(run)
    finally:
        for run in running:
            run.process.kill()
            run.process.wait()
    return well


def replay(path: Path) -> None:
    """Feed one input to the target that its folder names; raises what is wrong."""
    in_time(TARGETS[path.resolve().parent.name].check, path.read_bytes())
    say(f"{path}: passed")


def main() -> int:
    """Do what the command line says; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--only", choices=TARGETS, action="append", help="this target")
    parser.add_argument("--replay", type=Path, help="an input, in the folder of its target")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        replay(arguments.replay)
        return 0
    seed = arguments.seed or random.randrange(1, 2**31)
    say(f"SEED={seed}, {arguments.seconds:g} s a target")
    return 0 if fuzz(arguments.only or list(TARGETS), arguments.seconds, seed) else 1


if __name__ == "__main__":
    sys.exit(main())
