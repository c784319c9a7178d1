"""`make stress-handover FOR=300`: watchers are killed and stopped; workers hang and don't.

Fifty healthy workers must never be hurt, nor notice anything. Every worker that hangs must be
killed within its bound, with a report. At the end nothing may be left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import hangwatch
from hangwatch import linux
from support.processes import open_files
from support.watchers import RunningWatcher, wait_until, watcher_below

HEALTHY = 50
FAULT_EVERY = 0.5
HANG_EVERY = 0.4
# A worker's bound: what the kill takes on a busy machine, and for each fault around its
# deadline the time that nobody watches (at most 0.3 s, or 1.5 s if the watcher is stopped)
# and the 0.5 s in which a successor may kill.
UNDISTURBED = 2.0
COSTS = {signal.SIGKILL: 0.3 + 0.5, signal.SIGSTOP: 1.5 + 0.5}

HEALTHY_WORKER = """
import random, sys, time, hangwatch
while sys.stdin not in __import__("select").select([sys.stdin], [], [], 0)[0]:
    with hangwatch.expires(random.choice([8, 60]), random.choice(["a", "b", "c"])):
        time.sleep(random.uniform(0, 0.1))
"""

HANGING_WORKER = """
import ctypes, os, sys, time, hangwatch
r, w = os.pipe()
with hangwatch.expires(float(sys.argv[1]), "hangs"):
    os.write(1, b"%.6f" % (time.monotonic() + float(sys.argv[1])))
    ctypes.PyDLL(None).read(r, ctypes.create_string_buffer(1), 1)
"""


@dataclass
class Hanging:
    """A worker that hangs, and when its block expires (CLOCK_MONOTONIC)."""

    process: subprocess.Popen[str]
    deadline: float


@dataclass
class Tally:
    """What happened."""

    faults: list[tuple[float, signal.Signals]] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    reports: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def count(self, how: signal.Signals) -> int:
        """Count the faults of one kind."""
        return sum(kind is how for _, kind in self.faults)

    def bound(self, deadline: float) -> float:
        """Return until when (CLOCK_MONOTONIC) a block of this deadline must have been ended."""
        around = [how for at, how in self.faults if at > deadline - COSTS[how]]
        return deadline + UNDISTURBED + sum(COSTS[how] for how in around)

    def read_reports(self, watcher: RunningWatcher) -> None:
        """Note the reports so far: the folder keeps only the newest."""
        for path in watcher.report_dir.glob("[!.]*"):
            self.reports.setdefault(path.name, path.name.rpartition("hangs-")[2].partition(".")[0])


def start_hanging(watcher: RunningWatcher) -> Hanging:
    worker = watcher.python("-c", HANGING_WORKER, str(random.uniform(0.2, 2)))
    assert worker.stdout is not None
    deadline = float(os.read(worker.stdout.fileno(), 100) or "nan")
    worker.stdout.close()
    return Hanging(worker, deadline)


def disturb(watcher: RunningWatcher, tally: Tally) -> None:
    """Kill or stop the watcher that there is."""
    pid = watcher_below(watcher.keeper_pid)
    if pid is None:
        return
    how = signal.SIGKILL if random.random() < 0.7 else signal.SIGSTOP
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)
        tally.faults.append((time.monotonic(), how))


def look_after(hanging: list[Hanging], tally: Tally) -> None:
    """Note which of the hanging workers are dead, and complain of those that should be."""
    now = time.monotonic()
    for one in list(hanging):
        status = one.process.poll()
        if status is not None:
            tally.late.append(now - one.deadline)
            if status != -9 or now < one.deadline - 0.01:
                tally.problems.append(f"{one.process.pid} ended with {status}")
            hanging.remove(one)
        elif now > tally.bound(one.deadline):
            late = now - one.deadline
            tally.problems.append(f"{one.process.pid} was not reaped in time, {late:.2f} s late")
            one.process.kill()
            one.process.wait()
            hanging.remove(one)


def stress(watcher: RunningWatcher, seconds: float) -> Tally:
    """Run the stress; whatever is wrong is among the tally's problems."""
    tally = Tally()
    baseline = open_files(watcher.keeper_pid), open_files(watcher.pid)
    healthy = [
        watcher.python(
            "-c", HEALTHY_WORKER, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=None
        )
        for _ in range(HEALTHY)
    ]
    hanging: list[Hanging] = []
    pids = []
    until = time.monotonic() + seconds
    next_fault = next_hang = time.monotonic() + 2
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("stress", total=seconds)
        for _ in itertools.count():
            now = time.monotonic()
            if now > until:
                break
            if now >= next_fault:
                next_fault = now + FAULT_EVERY
                disturb(watcher, tally)
                tally.read_reports(watcher)
            if now >= next_hang:
                next_hang = now + HANG_EVERY
                hanging.append(start_hanging(watcher))
                pids.append(hanging[-1].process.pid)
            look_after(hanging, tally)
            progress.update(task, completed=seconds - (until - now))
            time.sleep(0.01)
    while hanging:
        look_after(hanging, tally)
        time.sleep(0.01)
    for worker in healthy:
        if worker.poll() is not None:
            tally.problems.append(f"a healthy worker ended with {worker.returncode}")
        _, err = worker.communicate("end\n", timeout=60)
        if worker.returncode or err:
            tally.problems.append(f"a healthy worker: status {worker.returncode}, {err!r}")
    try:
        wait_until(
            lambda: (open_files(watcher.keeper_pid), open_files(watcher.pid)) == baseline,
            "no descriptor is left over",
        )
    except AssertionError:
        now_open = open_files(watcher.keeper_pid), open_files(watcher.pid)
        tally.problems.append(f"descriptors left: {baseline} before, {now_open} now")
    time.sleep(1)
    tally.read_reports(watcher)
    reported = Counter(tally.reports.values())
    for pid in pids:
        if not reported[str(pid)]:
            tally.problems.append(f"{pid} was killed without a report")
    return tally


def main(seconds: float) -> int:
    """Run the stress and print what happened; the exit status says whether it was well."""
    console = Console(soft_wrap=True)
    linux.become_subreaper()  # whatever is left behind comes to us
    with tempfile.TemporaryDirectory(prefix="hw-stress-") as folder:
        os.chmod(folder, 0o700)
        server = hangwatch.SharedMemoryTimerServer(f"{folder}/sock", report_dir=f"{folder}/reports")
        # What it logs of every hang is not of interest here.
        log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT)
        screen = os.dup(2)
        os.dup2(log, 2)
        server.start()
        os.dup2(screen, 2)
        tally = stress(RunningWatcher(server, Path(folder) / "reports"), seconds)
        server.stop()
        if os.path.exists(f"{folder}/sock"):
            tally.problems.append("the socket file is left")
        tally.problems += tracebacks(Path(folder) / "log")
    own = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    left = Path(own).read_text().split()
    if left:
        tally.problems.append(f"processes left: {left}")
    extra = len(tally.reports) - len(set(tally.reports.values()))
    console.print(
        f"{seconds:g} s, {HEALTHY} healthy workers, {len(tally.late)} that hung; watchers killed "
        f"{tally.count(signal.SIGKILL)} times, stopped {tally.count(signal.SIGSTOP)} times\n"
        f"healthy hurt: {sum('healthy' in problem for problem in tally.problems)}; "
        f"dead after their deadline: {sorted(tally.late)[len(tally.late) // 2]:.2f} s in the "
        f"median, {max(tally.late):.2f} s at worst; reports: {len(tally.reports)}, of which "
        f"{extra} of a worker that has another\n"
        f"problems: {len(tally.problems)}"
    )
    for problem in tally.problems[:20]:
        console.print(f"  {problem}")
    return int(bool(tally.problems))


def tracebacks(log: Path) -> list[str]:
    """Return the errors that keeper and watchers logged of themselves."""
    text = log.read_text(errors="replace")
    return [
        f"in the log: {line}" for line in text.splitlines() if "Error:" in line or "failed" in line
    ]


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 300))
