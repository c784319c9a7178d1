"""What a block costs: CPU time against an empty `with` block of a Python class, and system calls.

Three processes take turns at every pattern, and measure an empty block beside each of their own:
a class that takes the same arguments and keeps them, `Empty`. One has the core in C, one that in
Python, and one uses the drop-in pair over a queue. A real watcher watches, and asyncio is
imported. A turn whose empty block was held up is discarded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import hangwatch

TURNS = 60
BLOCKS = 4_000
THREADS = 8
COUNTED_PAIRS = 50_000
STALL = 1.25
"""Wall time to CPU time of an empty block, or its CPU time to the median's: held up."""
_MARK = "/mark-of-the-benchmark"


@dataclass(frozen=True)
class Pattern:
    """Statements that are repeated, in which names stand for blocks.

    Attributes:
        body: the statements; ``A``, ``B`` and ``D`` make blocks with a name, with another, and
            with none, ``E`` an empty one; ``F`` is a decorated function, ``R`` renews a block.
        unit: the empty blocks that it is compared with, as many.
        blocks: how many each repetition has.
        way: ``loop``: in a running event loop; ``threads``: in eight threads.
        target: at most so many empty blocks with the core in C; `in_python`: in Python.
    """

    body: str
    unit: str = "with E: pass"
    blocks: int = 1
    way: str = ""
    target: float = 0.6
    in_python: float = 8.0


PATTERNS = {
    "one named scope": Pattern("with A: pass"),
    "default scope": Pattern("with D: pass"),
    "two scopes in turn": Pattern("with A: pass\n  with B: pass", blocks=2),
    "two nested, each": Pattern("with A:\n   with B: pass", "with E:\n   with E: pass", blocks=2),
    "decorated": Pattern("F()", target=1.0),
    "with in a running loop": Pattern("with A: pass", way="loop"),
    "async with": Pattern("async with A: pass", "async with E: pass", way="loop"),
    "eight threads": Pattern("with A: pass", way="threads"),
    "renew": Pattern("R()", target=0.2),
}
NAMES = {
    "A": "hangwatch.expires(after=60, scope='a')",
    "B": "hangwatch.expires(after=60, scope='b')",
    "D": "hangwatch.expires(after=60)",
    "E": "Empty(after=60, scope='a')",
}

# What others offer, and an empty class that takes no arguments, in one pattern each: set up
# once, then repeated so often a turn.
PEERS: dict[str, tuple[str, str, str, int]] = {
    "no arguments": (
        "one named scope",
        "class Bare:\n __enter__ = lambda self: self\n __exit__ = lambda self, *exc_info: None",
        "with Bare(): pass",
        BLOCKS,
    ),
    "signal.setitimer": (
        "one named scope",
        "import signal; R = signal.ITIMER_REAL; T = signal.setitimer",
        "T(R, 60); T(R, 0)",
        BLOCKS,
    ),
    "asyncio.timeout": ("async with", "", "async with asyncio.timeout(60): pass", 1000),
    "faulthandler": (
        "one named scope",
        "import faulthandler as f",
        "f.dump_traceback_later(60); f.cancel_dump_traceback_later()",
        100,
    ),
    "threading.Timer": (
        "one named scope",
        "from threading import Timer",
        "t = Timer(60, int); t.start(); t.cancel(); t.join()",
        100,
    ),
    "torch, queue": (
        "one named scope",
        "import multiprocessing, torch.distributed.elastic.timer as t;"
        "q = multiprocessing.get_context('spawn').Queue();"
        "t.configure(t.LocalTimerClient(q));"
        "server = t.LocalTimerServer(q, max_interval=0.2); server.start(); end = server.stop",
        "with t.expires(60, 'a'): pass",
        500,
    ),
}


class Empty:
    """The least that a context manager written in Python can do with such arguments."""

    def __init__(self, after: float, scope: str | None = None) -> None:
        self.after = after
        self.scope = scope

    def __enter__(self) -> Empty:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    async def __aenter__(self) -> Empty:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None


# -- a process that measures


def function_of(body: str, way: str, more: dict[str, object]) -> Callable[[int], object]:
    """Return a function that repeats a body so often."""
    word = "async def" if way == "loop" else "def"
    source = f"{word} run(count):\n for _ in range(count):\n  {named(body)}\n"
    names: dict[str, Any] = {"hangwatch": hangwatch, "asyncio": asyncio, "Empty": Empty, **more}
    exec(source, names)
    run: Callable[[int], Any] = names["run"]
    if way == "loop":
        loop = asyncio.new_event_loop()
        return lambda count: loop.run_until_complete(run(count))
    if way == "threads":
        pool = ThreadPoolExecutor(THREADS)
        return lambda count: list(pool.map(run, [count // THREADS] * THREADS))
    return run


def named(body: str) -> str:
    """Put blocks in the place of their names."""
    for name, block in NAMES.items():
        body = body.replace(f"with {name}:", f"with {block}:")
    return body


def cost(run: Callable[[int], object], count: int, blocks: int = 1) -> tuple[float, float]:
    """Return the CPU time of one block in nanoseconds, and wall time to CPU time."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    run(count // blocks)
    took = time.process_time_ns() - cpu
    return took / count, (time.perf_counter_ns() - wall) / took


def measure() -> None:
    """Answer questions: a pattern's name a line; see `Turn`."""

    def nothing() -> None:
        pass

    ends: list[Any] = []
    if "--pair" in sys.argv:
        queue = multiprocessing.get_context("fork").Queue()
        server = hangwatch.LocalTimerServer(queue, max_interval=60, report_dir=None)
        server.start()
        ends.append(server.stop)
        hangwatch.configure(hangwatch.LocalTimerClient(queue))
    with hangwatch.expires(60, "renewed") as open_block:
        more: dict[str, object] = {
            "F": hangwatch.expires(60, "f")(nothing),
            "R": open_block.renew,
        }
        runs = {
            name: (
                function_of(pattern.unit, pattern.way, more),
                function_of(pattern.body, pattern.way, more),
            )
            for name, pattern in PATTERNS.items()
        }
        peers: dict[str, list[tuple[str, Callable[[int], object], int]]] = {}
        for name, (pattern, setup, body, count) in PEERS.items() if "--peers" in sys.argv else ():
            names: dict[str, object] = {}
            try:
                exec(setup, names)
            except ImportError:
                continue
            ends += [names["end"]] if "end" in names else []
            run = function_of(body, PATTERNS[pattern].way, names)
            peers.setdefault(pattern, []).append((name, run, count))
        for both in runs.values():
            for run in both:
                run(1000)
        time.sleep(1)  # while the watcher looks at the page, everybody rings
        print(json.dumps({"core": hangwatch.worker.chosen_core.core.__name__}), flush=True)
        for line in sys.stdin:
            name = line.strip()
            unit, ours = runs[name]
            open_block.renew()
            empty, held_up = cost(unit, BLOCKS, PATTERNS[name].unit.count("with"))
            took, _ = cost(ours, BLOCKS, PATTERNS[name].blocks)
            others = {peer: cost(run, count)[0] for peer, run, count in peers.get(name, ())}
            turn = {"empty": empty, "held_up": held_up, "took": took, "peers": others}
            print(json.dumps(turn), flush=True)
    for end in ends:
        end()


# -- the process that asks


@dataclass
class Row:
    """What one process measured of one pattern, in nanoseconds a block."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    discarded: int = 0

    def judge(self) -> None:
        """Discard the turns whose empty block was held up."""
        median = statistics.median(turn["empty"] for turn in self.turns)
        good = [
            turn
            for turn in self.turns
            if turn["held_up"] < STALL and median / STALL < turn["empty"] < median * STALL
        ]
        self.discarded = len(self.turns) - len(good)
        self.turns = good or self.turns

    def median(self, what: str) -> float:
        """Return the median of what the turns say."""
        values: list[float] = [turn[what] for turn in self.turns]
        return statistics.median(values)

    def ratios(self, peer: str = "") -> tuple[float, float, float]:
        """Return the lower quartile, the median and the upper one, in empty blocks."""
        found = [
            (turn["peers"][peer] if peer else turn["took"]) / turn["empty"] for turn in self.turns
        ]
        low, middle, high = statistics.quantiles(found, n=4)
        return low, middle, high


class Asked:
    """A process that measures.

    Args:
        name: of its column.
        options: ``--peers``: the peers, too; ``--pair``: with a client of the queue's pair.
        pure: whether its core is the one in Python.

    Attributes:
        rows: what it measured, by pattern.
        core: its core.
    """

    def __init__(self, name: str, *options: str, pure: bool = False) -> None:
        self.name = name
        self.pure = pure
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--measure", *options],
            env={**os.environ, "HANGWATCH_PURE": str(int(pure))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rows = {name: Row() for name in PATTERNS}
        self.core = self._read()["core"].rpartition(".")[2]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def ask(self, pattern: str) -> None:
        """Have one turn measured."""
        assert self._process.stdin is not None
        print(pattern, file=self._process.stdin, flush=True)
        self.rows[pattern].turns.append(self._read())

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def show(processes: list[Asked], turns: int) -> None:
    """Print the table; the first process has measured the peers."""
    from rich.console import Console
    from rich.table import Table

    in_c = processes[0]
    for asked in processes:
        for row in asked.rows.values():
            row.judge()
    peers = [
        name
        for name, (pattern, *_) in PEERS.items()
        if name in in_c.rows[pattern].turns[0]["peers"]
    ]
    table = Table(title="CPU ns a block (in empty `with` blocks; quartiles)")
    for column in ("", "empty", *(asked.name for asked in processes), *peers):
        table.add_column(column, justify="right" if column else "left")
    worst: dict[str, tuple[float, str]] = {}
    for name, pattern in PATTERNS.items():
        cells = [f"{in_c.rows[name].median('empty'):.0f}"]
        for asked in processes:
            target = pattern.in_python if asked.pure else pattern.target
            low, middle, high = asked.rows[name].ratios()
            mark = "" if middle <= target else f" [bold red]over {target:g}[/]"
            took = asked.rows[name].median("took")
            cells.append(f"{took:.0f} ({middle:.2f}; {low:.2f} to {high:.2f}){mark}")
            worst[asked.name] = max(worst.get(asked.name, (0.0, "")), (middle, name))
        for peer in peers:
            if PEERS[peer][0] != name:
                cells.append("")
                continue
            ratio = in_c.rows[name].ratios(peer)[1]
            took = statistics.median(turn["peers"][peer] for turn in in_c.rows[name].turns)
            cells.append(f"{took:.0f} ({ratio:.1f})")
        table.add_row(name, *cells)
    Console(width=max(Console().width, 40 * len(table.columns)), highlight=False).print(table)
    if in_c.core == "core":
        print("the core in C was not built: every column shows the one in Python")
    for column, (ratio, name) in worst.items():
        print(f"the worst row of {column}: {name}, {ratio:.2f} empty blocks")
    discarded = sum(row.discarded for asked in processes for row in asked.rows.values())
    of_all = turns * len(PATTERNS) * len(processes)
    print(f"{discarded} of {of_all} turns were discarded: an empty block was held up")
    print(f"CPython {platform.python_version()}, {os.cpu_count()} CPUs, {processor()}")


def processor() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
    runs = [function_of(PATTERNS[name].body, "", {}) for name in list(PATTERNS)[:4]]
    for run in runs:
        run(1000)
    time.sleep(1)  # while the watcher looks at the page, everybody rings
    os.access(_MARK, os.F_OK)
    for run in runs:
        run(COUNTED_PAIRS // 6)  # two of them have two blocks
    os.access(_MARK, os.F_OK)


def main() -> int:
    """Print the figures; return 1 if a system call was made."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=TURNS, metavar="N", help="of each pattern")
    options.add_argument("--system-calls", action="store_true", help="look at these alone")
    for hidden in ("--between-marks", "--measure", "--peers", "--pair"):
        options.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.between_marks or chosen.measure:
        measure() if chosen.measure else run_between_marks()
        return 0
    with hangwatch.serve(report_dir=None):
        calls = count_system_calls()
        if not chosen.system_calls:
            processes = [
                Asked("core in C", "--peers"),
                Asked("core in Python", pure=True),
                Asked("the queue's pair", "--pair"),
            ]
            for _ in range(chosen.turns):
                for pattern in PATTERNS:
                    for asked in processes:
                        asked.ask(pattern)
            for asked in processes:
                asked.end()
            show(processes, chosen.turns)
    shown = "not counted: install strace" if calls is None else calls
    print(f"system calls in {COUNTED_PAIRS} pairs: {shown}")
    return 1 if calls else 0


if __name__ == "__main__":
    raise SystemExit(main())
