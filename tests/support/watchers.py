"""A real `hangwatch serve` process and the reports that it writes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hangwatch import SharedMemoryTimerServer
from support.nursery import LIMIT, Worker, nursery

# A worker gives up a handshake after 1 s and runs on unwatched. Of one that then hangs for good
# nobody would ever hear.
CONNECT = """
import os as _os
from hangwatch import HangwatchError as _Error
from hangwatch.worker.client import client_at as _client_at
while not _client_at(_os.environ["HANGWATCH_ADDRESS"]).is_connected:
    try: _client_at(_os.environ["HANGWATCH_ADDRESS"]).connect()
    except _Error: pass
"""


def wait_until(true: Callable[[], object], what: str, within: float = LIMIT) -> None:
    """Wait until `true()`; fail, naming `what`, if it isn't within `within` seconds."""
    until = time.monotonic() + within
    while not true():
        if time.monotonic() > until:
            raise AssertionError(f"not within {within} s: {what}")
        time.sleep(0.005)


def watcher_below(keeper: int) -> int | None:
    """Return the pid of a keeper's watcher, if there is one just now."""
    with contextlib.suppress(OSError):
        # What a watcher that died had just forked is the keeper's by now, and has its name yet.
        for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[::-1]:
            with contextlib.suppress(OSError):
                name, state = re.findall(r"\((.*)\) (.)", Path(f"/proc/{pid}/stat").read_text())[0]
                if name == "hw-watcher" and state != "Z":
                    return int(pid)
    return None


@dataclass
class RunningWatcher:
    """A watcher under test."""

    server: SharedMemoryTimerServer
    report_dir: Path

    @property
    def address(self) -> str:
        assert self.server.address is not None
        return self.server.address

    @property
    def keeper_pid(self) -> int:
        assert self.server.pid is not None
        return self.server.pid

    @property
    def pid(self) -> int:
        """The watcher's process id; waits until there is a watcher."""
        wait_until(lambda: watcher_below(self.keeper_pid), "a watcher")
        return watcher_below(self.keeper_pid) or self.pid

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a worker of this watcher."""
        return {**os.environ, "HANGWATCH_ADDRESS": self.address, **more}

    def worker(self, script: str, *arguments: str | Path, **options: Any) -> Worker:
        """Fork a worker that runs a script; its output is a pipe of text."""
        options.setdefault("env", self.environment())
        return nursery().fork(script, *map(str, arguments), **options)

    def connected_worker(self, script: str, *arguments: str | Path, **options: Any) -> Worker:
        """Fork a worker that is connected before its script begins, however long that takes."""
        return self.worker(CONNECT + script, *arguments, **options)

    def interpreter(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a worker that is an interpreter of its own; its output is a pipe of text."""
        options.setdefault("env", self.environment())
        options.setdefault("stdout", subprocess.PIPE)
        return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **options)

    def reports(self, **wanted: object) -> list[dict[str, Any]]:
        """Return every report so far whose worker or scope fields are `wanted`, oldest first."""
        # The folder's name tells the pid: a shared watcher has many other reports.
        paths = sorted(self.report_dir.glob(f"[!.]*-{wanted.get('pid', '')}*/report.json"))
        reports = [json.loads(path.read_text()) for path in paths]
        return [
            report
            for report in reports
            if all({**report["scope"], **report["worker"]}[k] == v for k, v in wanted.items())
        ]

    def report(self, **wanted: object) -> dict[str, Any]:
        """Wait for a report whose worker or scope fields are `wanted`."""
        return self.wait_for_reports(1, **wanted)[0]

    def wait_for_reports(self, count: int, **wanted: object) -> list[dict[str, Any]]:
        """Wait for so many reports whose worker or scope fields are `wanted`, oldest first."""
        what = f"{count} reports with {wanted}"
        wait_until(lambda: len(self.reports(**wanted)) >= count, what)
        return self.reports(**wanted)


def first_recovered(
    watcher: RunningWatcher, start: Callable[[], Worker]
) -> tuple[Worker, dict[str, Any]]:
    """Start workers until one does in time what saves it; return it and its report.

    Those before it, which a busy machine kept from that, must have been killed.
    """
    while True:
        worker = start()
        report = watcher.report(pid=worker.pid)
        if report["outcome"] == "recovered":
            return worker, report
        assert report["outcome"] == "reaped"
        assert worker.wait() < 0


class StartWatcher(Protocol):
    """Starts watchers of one's own: the fixture `start_watcher`."""

    def __call__(self, **options: Any) -> RunningWatcher: ...
