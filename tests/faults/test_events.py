"""Events: what a program hears of its watcher, by a callback or as lines of JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.evidence.model import Case, Evidence, Outcome, Report, Scope, ScopeThread
from hangwatch.evidence.model import Worker as ReportedWorker
from hangwatch.evidence.publish import publish
from support.nursery import Worker, nursery
from support.raw_worker import answer, hello, memfd
from support.watchers import CONNECT, RunningWatcher, wait_until, watcher_below

HANG = """
import sys, time, hangwatch
how, grace = sys.argv[1], 0 if sys.argv[1] == "reap" else 120
try:
    with hangwatch.expires(0.05, "hang", on_expiry=how, grace=grace):
        sys.stdin.read() if how == "report" else time.sleep(1000)
except hangwatch.TimerExpired: pass
"""

LEAVES = """
import hangwatch, sys
with hangwatch.expires(3600): sys.stdin.read()
"""


class Heard:
    """A server whose events are kept."""

    def __init__(self, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.server = hangwatch.SharedMemoryTimerServer(
            folder / "sock", report_dir=folder / "reports", on_event=self.hear
        )
        self.server.start()
        self.watcher = RunningWatcher(self.server, folder / "reports")

    def hear(self, event: Any) -> None:
        self.events.append(dict(event))

    def of(self, worker: Worker) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("pid") == worker.pid]

    def kinds(self, worker: Worker) -> list[str]:
        return [event["event"] for event in self.of(worker)]

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def wait_for(self, kind: str, worker: Worker) -> None:
        """Wait for a worker's event of a kind."""
        wait_until(lambda: kind in self.kinds(worker), f"{kind} of {worker.pid}")

    def restart(self) -> dict[str, Any]:
        """Kill the watcher; return what is heard of its successor."""
        before = len(self.named("restarted"))
        with contextlib.suppress(ProcessLookupError):  # its keeper may have replaced it
            os.kill(self.watcher.pid, signal.SIGKILL)
        wait_until(lambda: len(self.named("restarted")) > before, "the event")
        return self.named("restarted")[before]

    def all_is_told(self) -> None:
        """Wait until all that has happened so far is heard: a newcomer joins, and leaves."""
        with self.watcher.connected_worker(LEAVES, stdin=subprocess.PIPE) as newcomer:
            newcomer.communicate()
            self.wait_for("left", newcomer)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heard]:
    """Share it among tests, which look for the events of their own workers."""
    heard = Heard(tmp_path_factory.mktemp("heard"))
    yield heard
    heard.server.stop()


@pytest.mark.parametrize(
    ("how", "end"), [("reap", "reaped"), ("raise", "raised"), ("report", "reported")]
)
def test_a_worker_s_whole_story(heard: Heard, how: str, end: str) -> None:
    began = time.time()
    environment = heard.watcher.environment(RANK="3")
    worker = heard.watcher.connected_worker(HANG, how, env=environment, stdin=subprocess.PIPE)
    heard.wait_for(end, worker)
    worker.communicate()
    heard.wait_for("left", worker)
    heard.all_is_told()
    assert sorted(heard.kinds(worker)) == sorted(["joined", "expired", end, "left"])
    assert heard.kinds(worker)[:2] == ["joined", "expired"]
    for event in heard.of(worker):
        assert event["labels"] == {"rank": "3"}
        assert began <= event["at"] <= time.time()
    _, expired, ended = (event for event in heard.of(worker) if event["event"] != "left")
    assert (expired["scope"], expired["limit_s"], expired["thread"]) == ("hang", 0.05, "MainThread")
    assert expired["inside_s"] >= 0.05
    assert expired["late_s"] >= 0
    assert f"rank 3 (pid {worker.pid}) overran 'hang'" in expired["headline"]
    assert ended["headline"].startswith(expired["headline"] + ";")


def test_a_watcher_that_was_replaced(heard: Heard) -> None:
    worker = heard.watcher.connected_worker(LEAVES, stdin=subprocess.PIPE)
    heard.wait_for("joined", worker)
    assert heard.restart()["workers"] == 1
    worker.communicate()
    heard.wait_for("left", worker)
    heard.all_is_told()
    assert heard.kinds(worker) == ["joined", "left"], "it joined once"


def test_who_left_while_nobody_watched(heard: Heard) -> None:
    worker = heard.watcher.connected_worker(LEAVES, stdin=subprocess.PIPE)
    heard.wait_for("joined", worker)
    os.kill(heard.watcher.pid, signal.SIGSTOP)
    worker.kill()
    worker.communicate()
    restarted = heard.restart()
    assert heard.kinds(worker) == ["joined", "left"]
    assert restarted["workers"] == 0
    assert heard.events.index(heard.of(worker)[1]) < heard.events.index(restarted)


def test_a_watcher_that_did_not_run(heard: Heard) -> None:
    assert answer(heard.watcher.address, hello(), [memfd()]) is None, "it runs"
    before = len(heard.named("stalled"))
    watcher, keeper = heard.watcher.pid, heard.watcher.keeper_pid
    # Both, or the keeper would replace it.
    os.kill(keeper, signal.SIGSTOP)
    os.kill(watcher, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(watcher, signal.SIGCONT)
    os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: len(heard.named("stalled")) > before, "the event")
    assert all(event["for_s"] > 1.0 for event in heard.named("stalled"))


def test_a_callback_that_fails_or_dawdles_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Any) -> None:
        raise SystemExit(f"not interested in {event['event']}")

    server = hangwatch.SharedMemoryTimerServer(
        tmp_path / "sock", report_dir=tmp_path / "reports", on_event=fail
    )
    server.start()
    watcher = RunningWatcher(server, tmp_path / "reports")
    worker = watcher.connected_worker(HANG, "reap")
    worker.communicate()
    server.stop()
    assert worker.returncode == -9
    assert caplog.text.count("could not be passed on") >= 3
    assert watcher.reports()[0]["outcome"] == "reaped"


def test_serve_hears_of_this_very_process() -> None:
    script = """
import hangwatch
from hangwatch.worker import connection
connection.ANSWER_WITHIN = 120
heard = []
with hangwatch.serve(report_dir=None, on_event=heard.append):
    with hangwatch.expires(60): pass
print([event["event"] for event in heard if event["event"] != "stalled"])
"""
    program = nursery().fork(script)
    stdout, stderr = program.communicate()
    assert stdout == "['joined']\n", stderr
    assert program.returncode == 0


def run(tmp_path: Path, events: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "hangwatch", "run", "--events", str(events)),
            *("--report-dir", str(tmp_path / "reports"), "--", sys.executable, "-c", *command),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def test_lines_of_json_are_appended_to_a_file(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "earlier"}\n')
    result = run(tmp_path, events, CONNECT + HANG, "reap")
    assert result.returncode == 128 + 9
    # One record an incident, of several lines:
    assert result.stderr.count("hangwatch: WARNING") == 1
    lines = result.stderr.splitlines()
    assert "overran 'hang'" in lines[0]
    in_time = "no complete answer within" not in result.stderr
    assert lines[2].startswith("MainThread (") or not in_time, "then the stuck thread's stack"
    assert run(tmp_path, events, CONNECT + HANG, "raise").returncode == 0
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert sorted(kinds) == sorted(
        ["earlier", "joined", "expired", "reaped", "left", "joined", "expired", "raised", "left"]
    )
    assert watcher_below(os.getpid()) is None


def test_a_file_that_cannot_be_written_is_said_before_the_command_starts(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "missing" / "events", "print('started')")
    assert (result.returncode, result.stdout) == (125, "")
    assert "No such file or directory" in result.stderr
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = run(tmp_path, fifo, "print('started')")
    assert (result.returncode, result.stdout) == (125, ""), "nobody reads it"


def test_a_full_disk_is_said_once_and_the_command_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, Path("/dev/full"), CONNECT + HANG, "reap")
    assert result.returncode == 128 + 9
    assert result.stderr.count("events can't be written to /dev/full (No space left") == 1


def test_the_log_record_has_its_facts_in_extra(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(
        at=1.0,
        worker=ReportedWorker(7, 0, None, {"rank": "3"}, ["train.py"], "3.11"),
        scope=Scope("step", 1.0, 1.5, 0.5, 9, ScopeThread(1, 7, "MainThread"), []),
    )
    with caplog.at_level(logging.WARNING):
        publish(Report(Outcome.REAPED, case, Evidence(), []), None)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hangwatch.evidence", logging.WARNING)
    assert record.getMessage().splitlines()[0].startswith("rank 3 (pid 7) overran 'step'")
    facts = vars(record)["hangwatch"]
    assert facts == {
        "outcome": "reaped",
        "pid": 7,
        "labels": {"rank": "3"},
        "scope": "step",
        "limit_s": 1.0,
        "inside_s": 1.5,
        "late_s": 0.5,
        "thread": "MainThread",
        "report": None,
    }
