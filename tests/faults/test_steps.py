"""The watcher is killed, or stopped, at each of its steps: nobody is hurt, and nobody is missed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hangwatch import failpoints
from support.processes import is_alive, open_files
from support.watchers import RunningWatcher, StartWatcher, wait_until, watcher_below

STEPS = [
    name
    for name in failpoints.NAMES
    if name.startswith(("handshake.", "visit.", "incident.", "ladder.", "report.", "handover."))
]

# Steps of the first watcher, too.
FROM_THE_START = ("handover.forked", "handover.ready")

# Whom a watcher that is stopped does not answer in time runs on unwatched, and tries again.
HEALTHY = """
import os, sys, time, hangwatch
from hangwatch.worker.client import client_at
from select import select
client = client_at(os.environ["HANGWATCH_ADDRESS"])
while not (client.is_connected and select([sys.stdin], [], [], 0)[0]):
    with hangwatch.expires(after=60, scope="healthy"):
        time.sleep(0.02)
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""

HANGS = """
import os, subprocess, time, hangwatch
from hangwatch.worker.client import client_at
client = client_at(os.environ["HANGWATCH_ADDRESS"])
for _ in range(200):
    with hangwatch.expires(after=60, scope="connects"):
        if client.is_connected: break
        time.sleep(0.05)
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
with hangwatch.expires(after=0.3, scope="hangs"):
    time.sleep(1000)
"""


def start(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, what: str, **options: object
) -> RunningWatcher:
    """Start a watcher with failpoints."""
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, what)
        return start_watcher(**options)


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("step", STEPS)
def test_the_watcher_at_a_step(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: str,
    how: str,
) -> None:
    # The first visits are those of handshakes.
    faults = [f"{step}={how}@{4 if step.startswith('visit.') else 1}"]
    if step.startswith("handover."):
        # There must be somebody to be taken over.
        faults = ["incident.begun=kill@1", f"{step}={how}@{2 if step in FROM_THE_START else 1}"]
    watcher = start(start_watcher, monkeypatch, ",".join(faults))
    before = open_files(watcher.keeper_pid)
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    hangs = watcher.worker(HANGS, stderr=subprocess.DEVNULL)
    assert hangs.stdout is not None
    child = int(hangs.stdout.readline())
    assert hangs.wait(20) == -signal.SIGKILL
    hangs.stdout.close()
    wait_until(lambda: not is_alive(child), "its child has ended with it")
    report = watcher.report(pid=hangs.pid)
    assert report["scope"]["name"] == "hangs"
    assert report["outcome"] == "reaped"
    assert healthy.poll() is None, "the healthy worker was hurt"
    _, said = healthy.communicate("end\n", timeout=20)
    assert healthy.returncode == -signal.SIGKILL, "and was still watched"
    assert not re.search("Traceback|Error", said)
    wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
    assert watcher_below(watcher.keeper_pid) is not None
    watcher.server.stop()
    log = capfd.readouterr().err
    assert log.count("is replaced") == len(faults), "the step was reached"
    assert "Traceback" not in log


LONGER = """
import os, signal, sys, time, hangwatch
signal.signal(signal.SIGTERM, signal.SIG_IGN)
how, grace = sys.argv[1:]
try:
    with hangwatch.expires(0.3, "hangs", on_expiry=how, grace=float(grace)):
        print("in", flush=True)
        while True: time.sleep(0.01)
except hangwatch.TimerExpired:
    pass
with hangwatch.expires(0.3, "at last", on_expiry="reap", grace=0.0):
    time.sleep(1000)
"""


LONGER_STEPS = [
    ("incident.reporter", "raise", 1.0, "raised"),
    ("raise.asked", "raise", 1.0, "raised"),
    ("report.finished", "raise", 1.0, "raised"),
    ("error-file.written", "reap", 0.5, "reaped"),
    ("ladder.announced", "reap", 0.5, "reaped"),
    ("ladder.sent", "reap", 0.5, "reaped"),
    ("ladder.confirmed", "reap", 0.5, "reaped"),
    # The first time it is SIGTERM's, the second time SIGKILL's.
    ("ladder.tree@2", "reap", 0.5, "reaped"),
    ("ladder.looked@2", "reap", 0.5, "reaped"),
    ("ladder.announced@2", "reap", 0.5, "reaped"),
    ("ladder.sent@2", "reap", 0.5, "reaped"),
]


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize(("step", "how", "grace", "outcome"), LONGER_STEPS)
def test_the_watcher_at_a_step_of_a_longer_ladder(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    step: str,
    fault: str,
    how: str,
    grace: float,
    outcome: str,
) -> None:
    name, _, nth = step.partition("@")
    watcher = start(start_watcher, monkeypatch, f"{name}={fault}@{nth or 1}")
    before, first = open_files(watcher.keeper_pid), watcher.pid
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE)
    environment = watcher.environment(TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    began = time.monotonic()
    hangs = watcher.worker(LONGER, how, str(grace), env=environment)
    assert hangs.wait(30) == -signal.SIGKILL
    assert time.monotonic() - began > 0.3 + (grace if outcome == "reaped" else 0.3)
    hangs.communicate()
    reports = {}
    wait_until(lambda: len(watcher.reports()) >= (2 if outcome == "raised" else 1), "the reports")
    for report in watcher.reports():
        assert report["scope"]["name"] not in reports, "each is told once"
        reports[report["scope"]["name"]] = report["outcome"]
    assert reports.pop("hangs") == outcome
    assert reports in ({}, {"at last": "reaped"})
    assert json.loads((tmp_path / "error.json").read_text()), "why it died"
    assert healthy.poll() is None, "the healthy worker was hurt"
    healthy.communicate("end\n", timeout=20)
    assert healthy.returncode == -signal.SIGKILL, "and was still watched"
    wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
    assert watcher.pid != first, "the step was reached"


def test_whose_next_block_is_overdue_when_a_successor_comes(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block that was ended by `TimerExpired` is told of nevertheless, and not as the other."""
    faults = "raise.asked=sleep:1@1,raise.asked=kill@1"
    watcher = start(start_watcher, monkeypatch, faults)
    hangs = watcher.worker(LONGER, "raise", "2")
    assert hangs.wait(30) == -signal.SIGKILL
    hangs.communicate()
    wait_until(lambda: len(watcher.reports()) == 2, "the reports")
    reports = {report["scope"]["name"]: report for report in watcher.reports()}
    assert reports["hangs"]["outcome"] == "raised"
    assert reports["at last"]["outcome"] == "reaped"
    assert "raise" in [action["action"] for action in reports["hangs"]["actions"]]
    assert "raise" not in [action["action"] for action in reports["at last"]["actions"]]


def test_every_step_has_its_failpoint() -> None:
    source = Path(failpoints.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    assert set(re.findall(r'failpoint\("(.*)"\)', text)) == set(failpoints.NAMES)


def test_every_failpoint_of_the_watcher_is_reached_by_a_test() -> None:
    longer = [step.partition("@")[0] for step, *_ in LONGER_STEPS]
    others = [name for name in failpoints.NAMES if name.startswith(("evidence.", "kernel."))]
    others.append("sentence.carried-out")
    assert {*STEPS, *longer, *others} == set(failpoints.NAMES)
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name in others if f"{name}=" not in tests] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("visit.read", "none of NAME="),
        ("visit.read=explode", "none of NAME="),
        ("visit.red=kill", "there is no 'visit.red'"),
        ("visit.read=fail:EVERY", "no name of an error"),
    ],
)
def test_what_is_no_failpoint_is_said(text: str, says: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import hangwatch.failpoints"],
        env={**os.environ, failpoints.VARIABLE: text},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]


def test_no_worker_ever_loads_failpoints() -> None:
    script = (
        "import sys, hangwatch\n"
        "with hangwatch.expires(60, 'x'): pass\n"
        "assert 'hangwatch.failpoints' not in sys.modules\n"
    )
    environment = {**os.environ, "HANGWATCH_ADDRESS": "off"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_a_promise_of_a_watcher_that_answers_too_late_keeps_nobody_quiet(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has visited the page when the worker gives up: a promise of a minute stands there."""
    # The second time, when blocks have been armed already.
    twice = ",".join(f"handshake.watched=sleep:1.5@{nth}" for nth in (1, 2))
    watcher = start(start_watcher, monkeypatch, twice)
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    _, said = healthy.communicate("end\n", timeout=20)
    assert healthy.returncode == -signal.SIGKILL, "it is watched in the end"
    assert "did not answer within 1 s" in said


def test_evidence_that_hangs_holds_up_nothing(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.gathering=sleep:1000")
    with watcher.worker(HANGS) as hangs:
        assert hangs.wait(20) == -signal.SIGKILL
    report = watcher.report(pid=hangs.pid)
    assert "evidence: not complete within 2 s" in report["missing"]
    helpers = [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if watcher.pid == _parent(pid)
    ]
    wait_until(lambda: not any(map(is_alive, helpers)), "who gathered it is gone")


def test_a_reporter_that_hangs_holds_up_nothing(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.publishing=sleep:1000@1")
    for _ in range(2):
        with watcher.worker(HANGS) as hangs:
            assert hangs.wait(20) == -signal.SIGKILL
    assert watcher.report(pid=hangs.pid)["outcome"] == "reaped", "the second is reported"


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@pytest.mark.parametrize("pidfds", ["by the kernel", "by number"])
def test_a_kernel_without_pidfds_of_sockets(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, pidfds: str
) -> None:
    """Before Linux 6.5 a peer is held by its number, and the keeper keeps the pidfd."""
    what = "kernel.peer-pidfd=fail:ENOPROTOOPT" if pidfds == "by number" else ""
    watcher = start(start_watcher, monkeypatch, what)
    with watcher.worker(HANGS.replace("0.3", "1.5")) as hangs:
        assert hangs.stdout is not None
        hangs.stdout.readline()
        kept = [os.readlink(path) for path in Path(f"/proc/{watcher.keeper_pid}/fd").iterdir()]
        # Its own watcher, and the worker.
        assert kept.count("anon_inode:[pidfd]") == (1 if pidfds == "by the kernel" else 2)
        os.kill(watcher.pid, signal.SIGKILL)
        assert hangs.wait(20) == -signal.SIGKILL
    assert watcher.report(pid=hangs.pid)["outcome"] == "reaped"
