"""Events: what a program hears of its watcher, by a callback or as lines of JSON."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from hangwatch.evidence.model import Case, Evidence, Outcome, Report, Scope, ScopeThread, Worker
from hangwatch.evidence.publish import publish
from support.raw_worker import answer, hello, memfd
from support.watchers import RunningWatcher, wait_until, watcher_below

HANG = """
import sys, time, hangwatch
how, grace = sys.argv[1], 20 if len(sys.argv) > 2 else 0
try:
    with hangwatch.expires(0.3, "hang", on_expiry=how, grace=grace):
        time.sleep(1.5 if how == "report" else 1000)
except hangwatch.TimerExpired: pass
"""


class Heard:
    """A server whose events are kept."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.server = hangwatch.SharedMemoryTimerServer(
            folder / "sock", report_dir=folder / "reports", on_event=self.hear, **options
        )
        self.server.start()
        self.watcher = RunningWatcher(self.server, folder / "reports")

    def hear(self, event: Any) -> None:
        self.events.append(dict(event))

    def kinds(self, pid: int | None = None) -> list[str]:
        return [event["event"] for event in self.events if pid in (None, event.get("pid"))]


@pytest.fixture
def heard(tmp_path: Path) -> Any:
    heard = Heard(tmp_path)
    yield heard
    heard.server.stop()


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (["reap"], ["joined", "expired", "reaped", "left"]),
        (["raise"], ["joined", "expired", "raised", "left"]),
        (["report"], ["joined", "expired", "reported", "left"]),
    ],
)
def test_a_worker_s_whole_story(heard: Heard, arguments: list[str], kinds: list[str]) -> None:
    environment = heard.watcher.environment(RANK="3")
    worker = heard.watcher.worker(HANG, *arguments, env=environment)
    worker.communicate(timeout=30)
    heard.server.stop()
    assert sorted(heard.kinds(worker.pid)) == sorted(kinds), heard.events
    assert heard.kinds(worker.pid)[:2] == kinds[:2]
    for event in heard.events:
        assert event["labels"] == {"rank": "3"}
        assert abs(event["at"] - time.time()) < 60
    _, expired, ended = (e for e in heard.events if e["event"] != "left")
    assert (expired["scope"], expired["limit_s"], expired["thread"]) == ("hang", 0.3, "MainThread")
    assert expired["inside_s"] >= 0.3
    assert 0 <= expired["late_s"] < 5
    assert f"rank 3 (pid {worker.pid}) overran 'hang'" in expired["headline"]
    assert ended["headline"].startswith(expired["headline"] + ";")


def test_a_watcher_that_was_replaced(heard: Heard) -> None:
    script = "import hangwatch, sys\nwith hangwatch.expires(60): sys.stdin.read()"
    worker = heard.watcher.worker(script, stdin=subprocess.PIPE)
    wait_until(lambda: "joined" in heard.kinds(), "the worker")
    before = heard.watcher.pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: "restarted" in heard.kinds(), "the event")
    worker.communicate("")
    heard.server.stop()
    assert heard.kinds() == ["joined", "restarted", "left"], "it joined once"
    assert heard.events[1]["workers"] == 1


def test_who_left_while_nobody_watched(heard: Heard) -> None:
    script = "import hangwatch, sys\nwith hangwatch.expires(60): sys.stdin.read()"
    worker = heard.watcher.worker(script, stdin=subprocess.PIPE)
    wait_until(lambda: "joined" in heard.kinds(), "the worker")
    watcher = heard.watcher.pid
    os.kill(watcher, signal.SIGSTOP)
    worker.kill()
    worker.communicate()
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: "restarted" in heard.kinds(), "the event")
    assert heard.kinds() == ["joined", "left", "restarted"]
    assert (heard.events[1]["pid"], heard.events[2]["workers"]) == (worker.pid, 0)


def test_a_watcher_that_did_not_run(heard: Heard) -> None:
    assert answer(heard.watcher.address, hello(), [memfd()]) is None, "it runs"
    watcher, keeper = heard.watcher.pid, heard.watcher.keeper_pid
    # Both, or the keeper would replace it.
    os.kill(keeper, signal.SIGSTOP)
    os.kill(watcher, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(watcher, signal.SIGCONT)
    os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: "stalled" in heard.kinds(), "the event")
    (stalled,) = (event for event in heard.events if event["event"] == "stalled")
    assert stalled["for_s"] > 1.0


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
    worker = watcher.worker(HANG, "reap")
    worker.communicate(timeout=30)
    server.stop()
    assert worker.returncode == -9
    assert caplog.text.count("could not be passed on") >= 3
    assert watcher.reports()[0]["outcome"] == "reaped"


def test_serve_hears_of_this_very_process() -> None:
    script = """
import hangwatch
heard = []
with hangwatch.serve(report_dir=None, on_event=heard.append):
    with hangwatch.expires(60): pass
print([event["event"] for event in heard])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "['joined']\n"), result.stderr


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
    assert run(tmp_path, events, HANG, "reap").returncode == 128 + 9
    assert run(tmp_path, events, HANG, "raise", "grace").returncode == 0
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert sorted(kinds) == sorted(
        ["earlier", "joined", "expired", "reaped", "left", "joined", "expired", "raised", "left"]
    )


def test_a_file_that_cannot_be_written_is_said_before_the_command_starts(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "missing" / "events", "print('started')")
    assert (result.returncode, result.stdout) == (125, "")
    assert "No such file or directory" in result.stderr
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    result = run(tmp_path, fifo, "print('started')")
    assert (result.returncode, result.stdout) == (125, ""), "nobody reads it"


def test_a_full_disk_is_said_once_and_the_command_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, Path("/dev/full"), HANG, "reap")
    assert result.returncode == 128 + 9
    assert result.stderr.count("events can't be written to /dev/full (No space left") == 1


def test_the_log_record_has_its_facts_in_extra(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(
        at=1.0,
        worker=Worker(7, 0, None, {"rank": "3"}, ["train.py"], "3.11"),
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


def test_one_record_an_incident(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "events", HANG, "reap")
    assert result.stderr.count("hangwatch: WARNING") == 1
    lines = result.stderr.splitlines()
    assert "overran 'hang'" in lines[0]
    assert lines[2].startswith("MainThread ("), "then the stuck thread's stack"
    assert watcher_below(os.getpid()) is None
