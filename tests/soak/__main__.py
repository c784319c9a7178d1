"""`make soak SECONDS=60 SEED=7`: real workers under real faults, and a proof of what happened.

A dozen workers arm, disarm, renew, nest, pause, fork, exec, exit and hang while watchers,
workers and the machine are disturbed. Then `checker` judges what everybody logged.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import hangwatch
from hangwatch import linux
from hangwatch.failpoints import VARIABLE
from hangwatch.watcher.events import Event
from soak import faults
from soak.faults import BELL, BUSY, Injector
from support.checker import Checker, summary
from support.clocks import Clocks, stalls_in
from support.history import Death, Fault, History, Statement, bury, read_logs
from support.namespaces import prefix
from support.nursery import Nursery, Worker
from support.processes import Watched, errors_in, held_by, left_below_us
from support.stepped_clock import SteppedClock
from support.watchers import watcher_below

WORKERS = 12
ACTS = 8
FAULT_EVERY = 0.6
# A worker that lives longer hangs where nobody watches: it ends, so that others can play.
_OLD = 90.0
_END_WITHIN = 60.0
# In less than that, not everything need have happened.
_LONG_ENOUGH = 30.0
_ALONE = "HANGWATCH_SOAK_ALONE"
_KILLED = r"^hangwatch: WARNING: worker (\d+) overran '(.*?)': .*; killed, its death confirmed"
_OUTCOMES = {"expired", "reaped", "recovered", "reported", "raised", "gone", "unkillable"}


class Soak:
    """One soak.

    Args:
        seconds: for how long workers are started and faults inflicted.
        seed: chooses what everybody does.
        folder: where everything is written.
    """

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        self.history = History()
        self._seconds = seconds
        self._rng = random.Random(seed)
        self._folder = folder
        self._logs = folder / "logs"
        self._reports = folder / "reports"
        self._workers: dict[int, tuple[Worker, Watched, float]] = {}
        self._deaths: list[Death] = []
        self._looked = time.monotonic()
        self._reports_read: set[str] = set()
        self._logs.mkdir()
        (folder / "errors").mkdir()
        self._reports.mkdir(mode=0o700)
        self._errors = os.open(folder / "workers.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def run(self, progress: Progress) -> None:
        """Run it, and fill `history`."""
        clocks = Clocks(self._folder)
        disk = _small_disk(self._reports)
        clock = None
        stepped = {}
        with contextlib.suppress(FileNotFoundError):
            clock = SteppedClock(self._folder / "clock")
            stepped = clock.environment
        server = hangwatch.SharedMemoryTimerServer(
            self._folder / "sock", report_dir=self._reports, on_event=self._heard
        )
        with _environment(**stepped, **{VARIABLE: faults.RARELY}), _stderr(self._folder / "log"):
            server.start()
        with _environment(**stepped):
            self._nursery = Nursery("soak.traffic")
        assert server.pid is not None
        assert server.address is not None
        self._keeper = server.pid
        self._watcher = watcher_below(server.pid)
        self._environment = {**os.environ, **stepped, "HANGWATCH_ADDRESS": server.address}
        self.injector = Injector(
            self._rng,
            self._keeper,
            server.address,
            self._reports if disk else None,
            clock,
            lambda: [watched for _, watched, _ in self._workers.values()],
        )
        baseline = self._open_files()
        try:
            self._play(progress)
            self._look_for_leaks(baseline)
        finally:
            server.stop()
            self._nursery.close()
            clocks.close()
        self.history.faults += stalls_in(self._folder)
        self._conclude()

    def _play(self, progress: Progress) -> None:
        began = time.monotonic()
        until = began + self._seconds
        next_fault = began + 2.0
        playing = progress.add_task("soak", total=self._seconds)
        while self._workers or time.monotonic() < until:
            now = time.monotonic()
            if now < until:
                while len(self._workers) < WORKERS:
                    self._start_worker()
                if now >= next_fault:
                    next_fault = now + self._rng.uniform(0.5, 1.5) * FAULT_EVERY
                    self.injector.inflict()
            elif now > until + _END_WITHIN:
                self._end_who_is_older_than(0.0)
            self._end_who_is_older_than(_OLD)
            self.injector.look_after()
            self._wait_for_the_dead()
            self._look_at_the_watcher()
            self._read_reports()
            progress.update(playing, completed=min(now - began, self._seconds))
            time.sleep(0.01)
        self.injector.end()

    def _look_at_the_watcher(self) -> None:
        """Note that there is another one; one that is lost at once tells nobody of itself."""
        watcher = watcher_below(self._keeper)
        if watcher not in (None, self._watcher):
            self._watcher = watcher
            self.history.faults.append(Fault(time.monotonic(), "watcher lost", 0.0))

    def _start_worker(self) -> None:
        seed = str(self._rng.randrange(2**32))
        environment = self._environment
        if self._rng.random() < 1 / 3:
            error_file = str(self._folder / "errors" / f"{seed}.json")
            environment = {**environment, "TORCHELASTIC_ERROR_FILE": error_file}
        worker = self._nursery.fork(
            "from soak.traffic import main; main()",
            *(str(self._logs), seed, str(ACTS)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
        )
        self._workers[worker.pid] = worker, Watched(worker.pid), time.monotonic()

    def _end_who_is_older_than(self, seconds: float) -> None:
        for _, watched, began in self._workers.values():
            if time.monotonic() - began > seconds:
                self.injector.killed.add(watched.pid)
                watched.signal(signal.SIGKILL)

    def _wait_for_the_dead(self) -> None:
        before, self._looked = self._looked, time.monotonic()
        for pid, (worker, watched, _) in list(self._workers.items()):
            if watched.is_dead():
                self._note_death(before, pid, worker.wait())
                watched.close()
                worker.close()
                del self._workers[pid]
        # The orphans of workers come to us, and the hostile are ours.
        while (news := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if news.si_pid == self._keeper:  # its launcher waits for it
                raise AssertionError("the keeper has died")
            pid, status = os.waitpid(news.si_pid, 0)
            self._note_death(before, pid, os.waitstatus_to_exitcode(status))

    def _note_death(self, before: float, pid: int, status: int) -> None:
        by_us = pid in self.injector.killed
        self._deaths.append(Death(before, time.monotonic(), pid, status, by_us))

    # -- what the watcher says

    def _heard(self, event: Event) -> None:
        now = time.monotonic()
        if event["event"] in _OUTCOMES:
            statement = Statement(now, event["pid"], event["scope"], event["event"])
            self.history.statements.append(statement)

    def _read_reports(self) -> None:
        for path in self._reports.glob("[!.]*"):
            if path.name not in self._reports_read:
                # The folder keeps but the newest.
                with contextlib.suppress(FileNotFoundError):
                    report = json.loads((path / "report.json").read_text())
                    self._reports_read.add(path.name)
                    worker, scope = report["worker"]["pid"], report["scope"]["name"]
                    self.history.statements.append(
                        Statement(time.monotonic(), worker, scope, report["outcome"], True)
                    )

    # -- the end

    def _open_files(self) -> list[tuple[int, int, int]]:
        return held_by(self._keeper, watcher_below(self._keeper) or self._keeper)

    def _look_for_leaks(self, baseline: list[tuple[int, int, int]]) -> None:
        until = time.monotonic() + 20
        while (now := self._open_files()) != baseline and time.monotonic() < until:
            self._wait_for_the_dead()
            time.sleep(0.05)
        if now != baseline:
            self.history.leaks.append(f"keeper and watcher: {baseline} before, {now} at the end")
        if linux.fence() is False:
            self.history.errors.append("no fence on this machine")

    def _conclude(self) -> None:
        history = self.history
        self._read_reports()
        # Reporters that have outlived their watcher, and whoever else is still to go.
        until = time.monotonic() + 10
        while (left := left_below_us()) and time.monotonic() < until:
            self._wait_for_the_dead()
            time.sleep(0.05)
        if (self._folder / "sock").exists():
            history.leaks.append("the socket's file")
        for name in ("log", "workers.stderr"):
            text = (self._folder / name).read_text(errors="replace")
            history.errors += [f"in {name}: {line}" for line in errors_in(text)]
        told = re.findall(_KILLED, (self._folder / "log").read_text(errors="replace"), re.M)
        history.logged = [(int(pid), scope) for pid, scope in told]
        hostile = self.injector.hostile
        history.errors += [f"not inflicted: {fault}" for fault in self.injector.left_out]
        # They do nothing that anybody should be killed for.
        history.bystanders = [
            (hostile[death.pid], death.status)
            for death in self._deaths
            if hostile.get(death.pid) in (BUSY, BELL)
        ]
        history.statements[:] = [said for said in history.statements if said.pid not in hostile]
        history.faults += self.injector.faults
        history.lives = read_logs(self._logs)
        bury(history.lives, self._deaths)
        orphans = {pid for life in history.lives if life.by_us for pid in life.spawned}
        for pid, name in left.items():
            # Whose worker we have killed ourselves is ours to end.
            if pid in orphans:
                os.kill(pid, signal.SIGKILL)
            else:
                history.leaks.append(f"process {pid} ({name})")


def _small_disk(folder: Path) -> bool:
    """Give the reports a file system that can be filled, if we may."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(folder)]
    return _ALONE in os.environ and subprocess.run(command, check=False).returncode == 0


@contextlib.contextmanager
def _environment(**more: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _stderr(path: Path) -> Iterator[None]:
    """Let what is started write to a file what it has to say."""
    log, screen = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.dup(2)
    os.dup2(log, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(log)
        os.close(screen)


def main(seconds: float, seed: int) -> int:
    """Run a soak and say what came of it; the exit status says whether it was clean."""
    console = Console(stderr=True, soft_wrap=True)
    linux.become_subreaper()  # whatever is left behind comes to us
    with tempfile.TemporaryDirectory(prefix="hw-soak-") as name:
        folder = Path(name)
        folder.chmod(0o700)
        soak = Soak(seconds, seed, folder)
        console.print(f"soak: {seconds:g} s, seed {seed}, {WORKERS} workers at once")
        with Progress(console=console) as progress:
            soak.run(progress)
        checker = Checker(soak.history)
        problems = checker.problems()
        if seconds >= _LONG_ENOUGH:
            problems += checker.idleness()
        print(f"{seconds:g} s, seed {seed}:\n{summary(soak.history, checker, problems)}")
        for problem in problems[:30]:
            print(f"  {problem}")
        kept = Path("build") / f"soak-{seed}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, ignore=lambda folder, names: {"sock"} & set(names))
        (kept / "history.json").write_text(json.dumps(asdict(soak.history)))
        print(f"what everybody logged: {kept}")
        subprocess.run(["umount", "-q", str(folder / "reports")], check=False, capture_output=True)
    return int(bool(problems))


if __name__ == "__main__":
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    chosen = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    chosen = chosen or random.randrange(1, 10**6)
    alone = prefix()
    if alone is not None and _ALONE not in os.environ:
        # In namespaces of its own: no fault hits anybody else, and all ends with it.
        arguments = [sys.executable, "-m", "soak", str(duration), str(chosen)]
        os.execvpe(alone[0], [*alone, *arguments], {**os.environ, _ALONE: "1"})
    sys.exit(main(duration, chosen))
