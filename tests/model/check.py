"""Check the model of the protocol with Spin: each variant must come out as it is meant to.

"holds" means that all states were searched and none is wrong; a search that was cut short, for
want of depth, memory or time, is a failure. "counterexample" means that an assertion failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("protocol.pml")
# COLLAPSE packs the states without losing any, as hashing would.
_COMPILE = ("-w", "-DSAFETY", "-DCOLLAPSE", "-DNOFAIR", "-DMEMLIM=1000")
_AT_ONCE = 2
_WITHIN = 900.0


@dataclass(frozen=True)
class Variant:
    """One run: a name, whether the property must hold, the switches, what it shows."""

    name: str
    holds: bool
    switches: str
    shows: str


@dataclass(frozen=True)
class Found:
    """What a run gave: whether the property holds (None: no answer, and why), how many states."""

    holds: bool | None
    states: int = 0
    why: str = ""


ONE = "THREADS=1 ARMS=2 LAST=4"
TWO = "THREADS=2 ARMS=1 LAST=3 COARSE ONE_STORE"
TWO_AGAIN = "THREADS=2 ARMS=2 LAST=2 COARSE ONE_STORE"
TWO_MOVED = "THREADS=2 ARMS=1 LAST=2 COARSE"
DEATH = "THREADS=1 ARMS=2 LAST=3 DEATHS=1"
PAGES = "THREADS=2 PAGES=2 ARMS=1 LAST=2 COARSE SAME_LIMIT ONE_STORE DEATHS=1"
BUDGET = "THREADS=1 ARMS=2 LAST=3 BUDGET"
SWEPT = "THREADS=1 ARMS=2 LAST=4 NO_FENCE SWEEP=2"

VARIANTS = [
    # What the code does.
    Variant("one-thread", True, ONE, "arm, leave, arm again: no deadline is missed"),
    Variant("two-threads", True, TWO, "two threads arm in one page"),
    Variant("two-threads-again", True, TWO_AGAIN, "... leave, and arm again"),
    Variant("two-threads-moved", True, TWO_MOVED, "... and ringing takes long"),
    Variant("death", True, DEATH, "a watcher dies at any step; its successor"),
    Variant("death-two-pages", True, PAGES, "the successor visits every page"),
    Variant("stopped", True, f"{DEATH} STOPPED", "stopped for good: no worker waits for it"),
    Variant("in-use-at-once", True, f"{TWO} IN_USE_FROM_THE_START", "no GIL: all slots count"),
    Variant("budget", True, BUDGET, "a page that is served slowly, not never"),
    Variant("sweep", True, SWEPT, "without the fence: late by one sweep at most"),
    # Without what carries it.
    Variant("no-fence", False, f"{ONE} NO_FENCE", "neither fence nor sweep"),
    Variant("no-sweep", False, f"{SWEPT} NO_SWEEP", "the sweep's bound without a sweep"),
    Variant("half-a-sweep", False, f"{SWEPT} BOUND=1", "a bound of half the sweep's"),
    Variant("no-zero", False, f"{ONE} NO_ZERO", "the old promise stands while the page is read"),
    Variant("look-before-store", False, f"{ONE} LOOK_BEFORE_STORE", "the worker looks too early"),
    Variant("quiet-unpromised", False, f"{ONE} QUIET_WITHOUT_PROMISE", "quiet without now < ..."),
    Variant("in-use-late", False, f"{ONE} SLOTS_IN_USE_AFTER_ARMING", "in use only once armed"),
    Variant("in-use-raced", False, f"{TWO} NO_GIL", "slots in use counted in two steps"),
    Variant("heard-late", False, f"{ONE} RING_HEARD_AFTER_VISIT", "visit first, read rings then"),
    Variant("slot-forgotten", False, f"{TWO} PROMISE_FORGETS_A_SLOT", "an armed slot not counted"),
    Variant("no-second-ring", False, f"{ONE} NO_SECOND_RING", "a slow ring, no other after it"),
    Variant("clock-before-store", False, f"{ONE} CLOCK_BEFORE_STORE", "... or by an old clock"),
    Variant("judged-by-entry", False, f"{ONE} JUDGED_BY_ENTRY", "a moved deadline judged as old"),
    Variant("judged-at-once", False, f"{ONE} JUDGED_AT_ONCE", "judged before a second look"),
    Variant("moved-meanwhile", False, f"{ONE} ENDED_MEANWHILE_IS_ALL", "no visit after a miss"),
    Variant("other-due", False, f"{TWO} ENDED_MEANWHILE_IS_ALL", "... nor for the other thread"),
    Variant("muted-for-ever", False, f"{BUDGET} MUTED_FOR_EVER", "muted by one, visited by all"),
    Variant("successor-sleeps", False, f"{DEATH} SUCCESSOR_SLEEPS", "it visits no page"),
    Variant(
        "successor-trusts",
        False,
        f"{DEATH} SUCCESSOR_TRUSTS_THE_PROMISE",
        "it waits until the dead watcher's promise",
    ),
    Variant("successor-misses", False, f"{PAGES} SUCCESSOR_MISSES_A_PAGE", "it misses one page"),
    # A model in which nothing happens proves nothing: these must be reached.
    Variant("reach-quiet", False, f"{ONE} REACH=1", "an arming is quiet"),
    Variant("reach-unarmed", False, f"{ONE} REACH=2", "... by a promise of an unarmed slot"),
    Variant(
        "unarmed-uncounted",
        True,
        f"{ONE} REACH=2 PROMISE_WITHOUT_UNARMED",
        "... which is what that promise is for",
    ),
    Variant("reach-found", False, f"{ONE} REACH=3", "a deadline is found due"),
    Variant("reach-found-budget", False, f"{BUDGET} REACH=3", "... in a page with a budget"),
    Variant("reach-found-quiet", False, f"{ONE} REACH=4", "... of a block that never rang"),
    Variant("reach-found-two", False, f"{TWO} REACH=4", "... one of two threads"),
    Variant("reach-successor", False, f"{PAGES} REACH=5", "... by a successor, in the last page"),
    Variant("reach-told-twice", False, f"{ONE} REACH=6", "... and the later one of that entry"),
    Variant("reach-swept", False, f"{SWEPT} REACH=7", "... that only the sweep can find"),
    Variant("reach-full", False, f"{ONE} REACH=8", "a ring that finds the socket full"),
]


def run(variant: Variant, folder: Path) -> Found:
    """Search a variant's states; the files of the search stay in `folder`."""
    shutil.copy(MODEL, folder)
    # A counterexample is found soon: no long compilation for it.
    level = "-O1" if variant.holds else "-O0"
    for command in (
        ["spin", "-a", *_switches(variant), MODEL.name],
        ["gcc", level, *_COMPILE, "-o", "pan", "pan.c"],
    ):
        status, said = _call(command, folder)
        if status != 0 or "Error" in said:
            return Found(None, why=said.strip())
    status, said = _call(["./pan", "-m1000000", "-w24"], folder)
    errors = re.search(r"errors: (\d+)", said)
    stored = re.search(r"(\d+) states, stored", said)
    if errors is None or stored is None:
        return Found(None, why=f"status {status}: {said.strip()[-500:]}")
    states = int(stored[1])
    if errors[1] != "0":
        broken = "assertion violated" in said
        return Found(False if broken else None, states, "" if broken else said.splitlines()[0])
    if status != 0 or re.search("Search not completed|search depth too small|out of mem", said):
        return Found(None, states, "the search was cut short")
    return Found(True, states)


def trail(variant: Variant, folder: Path) -> str:
    """Return a counterexample, one step a line."""
    return _call(["spin", "-t", "-p", "-g", "-l", *_switches(variant), MODEL.name], folder)[1]


def _switches(variant: Variant) -> list[str]:
    return [f"-D{switch}" for switch in variant.switches.split()]


def _call(command: list[str], folder: Path) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_WITHIN
        )
    except subprocess.TimeoutExpired:
        return -1, f"{command[0]} did not end within {_WITHIN:.0f} s"
    return done.returncode, done.stdout + done.stderr


def _timed(variant: Variant, wants_trail: bool) -> tuple[Found, float, str]:
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        found = run(variant, Path(name))
        took = time.monotonic() - began
        return found, took, trail(variant, Path(name)) if wants_trail else ""


def main() -> int:
    """Run the variants; the exit status says whether all are as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these variants")
    parser.add_argument("--trail", metavar="NAME", help="print a variant's counterexample")
    arguments = parser.parse_args()
    for tool, package in (("spin", "spin"), ("gcc", "gcc libc6-dev")):
        if shutil.which(tool) is None:
            sys.exit(f"the model needs {tool}: install it (Debian: apt-get install {package})")
    wanted = {arguments.trail} if arguments.trail else set(arguments.names)
    unknown = wanted - {variant.name for variant in VARIANTS}
    if unknown:
        sys.exit(f"no such variant: {', '.join(sorted(unknown))}")
    wrong = 0
    chosen = [variant for variant in VARIANTS if not wanted or variant.name in wanted]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        runs = pool.map(lambda variant: _timed(variant, bool(arguments.trail)), chosen)
        for variant, (found, took, steps) in zip(chosen, runs, strict=True):
            as_expected = found.holds is variant.holds
            wrong += not as_expected
            outcome = {True: "holds", False: "counterexample", None: "NO ANSWER"}[found.holds]
            mark = "ok " if as_expected else "BAD"
            size = f"{found.states:>10,} states {took:5.1f} s"
            print(mark, f"{variant.name:18} {outcome:14} {size}  {variant.shows}", flush=True)
            print(end="".join(f"{text}\n" for text in (found.why, steps) if text))
    print(f"{wrong} not as expected" if wrong else "the protocol holds, and each break breaks it")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
