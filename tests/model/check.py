"""Check every variant of the protocol's model with Spin: what must hold, and what must break.

Usage: check.py [NAME ...] [--trail NAME]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("protocol.pml")
_MEMORY_MB = 4000
_COMPILE = ["-O2", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={_MEMORY_MB}", "-DVECTORSZ=512"]


@dataclass(frozen=True)
class Variant:
    """One run: a name, whether the property must hold, the switches, what it shows."""

    name: str
    holds: bool
    switches: str
    shows: str


ONE, TWO = "THREADS=1", "THREADS=2 ARMS=1 LAST=2 ONE_LIMIT"
PAGES = "THREADS=2 ARMS=1 LAST=1 ONE_LIMIT PAGES=2 DEATHS=1"
SWEPT = f"{ONE} NO_FENCE LAST=5"

VARIANTS = [
    # What the code does.
    Variant("one-thread", True, ONE, "arm, leave, arm again: no deadline is missed"),
    Variant("two-threads", True, TWO, "two threads arm in one page"),
    Variant("death", True, f"{ONE} DEATHS=1", "a watcher dies at any step; its successor"),
    Variant("death-two-pages", True, PAGES, "the successor visits every page"),
    Variant("stopped", True, f"{ONE} DEATHS=1 STOPPED", "stopped at any step: nobody is stuck"),
    Variant("budget", True, f"{ONE} BUDGET ARMS=1", "a page that is served slowly, not never"),
    Variant("sweep", True, f"{SWEPT} SWEEP=2", "without the fence: late by one sweep at most"),
    # Without what carries it.
    Variant("no-fence", False, f"{ONE} NO_FENCE", "neither fence nor sweep"),
    Variant("no-zero", False, f"{ONE} NO_ZERO", "the old promise stands while the page is read"),
    Variant("look-before-store", False, f"{ONE} LOOK_BEFORE_STORE", "the worker looks too early"),
    Variant("quiet-unpromised", False, f"{ONE} QUIET_WITHOUT_PROMISE", "quiet after the promise"),
    Variant("in-use-late", False, f"{ONE} SLOTS_IN_USE_AFTER_ARMING", "in use only once armed"),
    Variant("heard-late", False, f"{ONE} RING_HEARD_AFTER_VISIT", "visit first, read rings then"),
    Variant("slot-forgotten", False, f"{TWO} PROMISE_FORGETS_A_SLOT", "an armed slot not counted"),
    Variant("no-second-ring", False, f"{ONE} NO_SECOND_RING", "a slow ring, no other after it"),
    Variant("judged-by-entry", False, f"{ONE} JUDGED_BY_ENTRY", "a moved deadline judged as old"),
    Variant("moved-meanwhile", False, f"{ONE} ENDED_MEANWHILE_IS_ALL", "no visit after a miss"),
    Variant(
        "muted-for-ever", False, f"{ONE} BUDGET MUTED_FOR_EVER", "muted by one, visited by all"
    ),
    Variant("successor-sleeps", False, f"{ONE} DEATHS=1 SUCCESSOR_SLEEPS", "it visits no page"),
    Variant(
        "successor-trusts",
        False,
        f"{ONE} DEATHS=1 SUCCESSOR_TRUSTS_THE_PROMISE",
        "it waits until the dead watcher's promise",
    ),
    Variant("successor-misses", False, f"{PAGES} SUCCESSOR_MISSES_A_PAGE", "it misses one page"),
    # A model in which nothing happens proves nothing: these must be reached.
    Variant("reach-quiet", False, f"{ONE} REACH=1", "an arming is quiet"),
    Variant("reach-unarmed", False, f"{ONE} REACH=2", "... by a promise of an unarmed slot"),
    Variant("reach-found", False, f"{TWO} REACH=3", "a deadline is found due"),
    Variant("reach-found-quiet", False, f"{ONE} REACH=4", "... of a block that never rang"),
    Variant("reach-successor", False, f"{ONE} DEATHS=1 REACH=5", "... by a successor"),
    Variant("reach-told-twice", False, f"{ONE} REACH=6", "... and the later one of that entry"),
    Variant("reach-swept", False, f"{SWEPT} SWEEP=2 REACH=7", "... that only the sweep can find"),
    Variant("reach-full", False, f"{ONE} REACH=8", "a ring that finds the socket full"),
]


def run(variant: Variant, folder: Path) -> tuple[bool | None, str]:
    """Check a variant; tell whether it holds (None: the search did not finish), and its size."""
    shutil.copy(MODEL, folder)
    switches = [f"-D{switch}" for switch in variant.switches.split()]
    for command in (
        ["spin", "-a", *switches, MODEL.name],
        ["gcc", *_COMPILE, "-o", "pan", "pan.c"],
    ):
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            return None, (made.stdout + made.stderr).strip()
    search = subprocess.run(
        ["./pan", "-m1000000", "-w24"], cwd=folder, capture_output=True, text=True, check=False
    )
    out = search.stdout
    states = re.search(r"(\d+) states, stored", out)
    size = f"{int(states[1]):>9,} states" if states else out.strip()[-500:]
    if "assertion violated" in out:
        return False, size
    complete = "errors: 0" in out and "out of memory" not in out
    cut = re.search("Search not completed|max search depth too small|resource limit", out)
    return (True if complete and cut is None else None), size


def trail(variant: Variant, folder: Path) -> str:
    """Return a counterexample, one step a line."""
    switches = [f"-D{switch}" for switch in variant.switches.split()]
    command = ["spin", "-t", "-p", "-g", "-l", *switches, MODEL.name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


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
    for variant in VARIANTS:
        if wanted and variant.name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            began = time.monotonic()
            holds, size = run(variant, Path(name))
            took = time.monotonic() - began
            if arguments.trail:
                print(trail(variant, Path(name)))
        found = {True: "holds", False: "counterexample", None: "DID NOT FINISH"}[holds]
        as_expected = holds is variant.holds
        wrong += not as_expected
        mark = "ok " if as_expected else "BAD"
        print(
            f"{mark} {variant.name:18} {found:15} {size} {took:5.1f} s  {variant.shows}", flush=True
        )
    print(
        f"{wrong} of them not as expected"
        if wrong
        else "the protocol holds, and each break breaks it"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
