"""How long nobody watches after the watcher's SIGKILL, or SIGSTOP, with many workers connected.

Real workers connect, then this process, whose page a successor therefore visits last. The
gap ends when that page has been visited; it is seen in the page itself. A worker that overruns
while nobody watches must be dead half a second after that.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hangwatch
from hangwatch.page.layout import WATCH_UNTIL
from hangwatch.worker.client import client_at

GOAL_MS = {signal.SIGKILL: 300.0, signal.SIGSTOP: 1500.0}
_MARK = 1.0


def start_workers(count: int) -> list[int]:
    """Fork `count` workers, each inside of a block; return their pids."""
    pids = []
    for number in range(count):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            with hangwatch.expires(3600, "idle"):
                os.close(read_end)
                os.write(write_end, b"!")
                os.close(write_end)
                signal.pause()
            os._exit(0)
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)
        pids.append(pid)
        if sys.stderr.isatty() and number % 50 == 49:
            print(f"\r{number + 1} of {count} workers", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return pids


def watcher_of(keeper: int) -> int:
    """Return the watcher's pid."""
    while True:
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text() == "hw-watcher\n":
                return int(pid)


def gap(keeper: int, words: memoryview[float], how: signal.Signals) -> float:
    """Kill or stop the watcher; return the seconds until this process's page is visited again."""
    watcher = watcher_of(keeper)
    words[WATCH_UNTIL] = _MARK
    began = time.monotonic()
    os.kill(watcher, how)
    while words[WATCH_UNTIL] == _MARK:
        time.sleep(0.0005)
    return time.monotonic() - began


def overdue_gap(keeper: int, words: memoryview[float]) -> float:
    """Have a worker overrun while nobody watches; return what its end took after readiness."""
    stuck = "import hangwatch, time\nwith hangwatch.expires(0.2): print(flush=True); time.sleep(99)"
    worker = subprocess.Popen([sys.executable, "-c", stuck], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    watcher = watcher_of(keeper)
    os.kill(keeper, signal.SIGSTOP)
    os.kill(watcher, signal.SIGKILL)
    time.sleep(0.4)
    words[WATCH_UNTIL] = _MARK
    os.kill(keeper, signal.SIGCONT)
    while words[WATCH_UNTIL] == _MARK:
        time.sleep(0.0005)
    ready = time.monotonic()
    worker.communicate()
    return time.monotonic() - ready


def memory_mib(pid: int) -> float:
    """Return a process's proportional set size in MiB; proc(5)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("\nPss:")[2].split()[0]) / 1024


def measure(count: int, times: int, how: signal.Signals) -> float:
    """Print the gaps with `count` workers; return their median in ms."""
    with hangwatch.serve(report_dir=None) as server:
        assert server.address is not None
        assert server.pid is not None
        pids = start_workers(count - 1)
        with hangwatch.expires(3600, "measuring"):
            words = client_at(server.address).page.words
            gaps = []
            for _ in range(times):
                time.sleep(0.5)
                gaps.append(gap(server.pid, words, how) * 1000)
            time.sleep(0.5)
            overdue = [overdue_gap(server.pid, words) * 1000 for _ in range(5)]
            keeper, watcher = memory_mib(server.pid), memory_mib(watcher_of(server.pid))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    median = statistics.median(gaps)
    print(
        f"{count:5} workers: {median:4.0f} ms in the median of {times} {how.name}s, "
        f"{max(gaps):.0f} ms at worst (goal {GOAL_MS[how]:g} ms); "
        f"keeper {keeper:.0f} MiB, watcher {watcher:.0f} MiB (PSS); who overran meanwhile is "
        f"dead {statistics.median(overdue):.0f} ms after that, {max(overdue):.0f} ms at worst "
        "(goal 500 ms)",
        flush=True,
    )
    return median


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workers", type=int, nargs="*", default=[1, 100, 1000])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--stop", action="store_true", help="SIGSTOP it instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        how = signal.SIGSTOP if arguments.stop else signal.SIGKILL
        medians = [measure(count, arguments.times, how) for count in arguments.workers]
    return int(max(medians) > GOAL_MS[how])


if __name__ == "__main__":
    sys.exit(main())
