"""The watcher is killed, or stopped, at each of its steps: nobody is hurt, and nobody is missed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hangwatch import failpoints
from hangwatch.process import read_stat
from support.nursery import Worker, nursery
from support.processes import is_alive, open_files
from support.watchers import RunningWatcher, StartWatcher, wait_until, watcher_below

STEPS = [
    name
    for name in failpoints.NAMES
    if name.startswith(("handshake.", "visit.", "incident.", "ladder.", "report.", "handover."))
]

# A watcher that starts without workers comes to these, too.
FROM_THE_START = ("handover.forked", "handover.ready")

# A worker that a stopped watcher does not answer in time runs on unwatched, and tries again.
HEALTHY = """
import os, select, sys, time, hangwatch
from hangwatch.worker.client import client_at
client = client_at(os.environ["HANGWATCH_ADDRESS"])
while not (client.is_connected and select.select([sys.stdin], [], [], 0.02)[0]):
    with hangwatch.expires(after=1000, scope="healthy"):
        time.sleep(0.002)
with hangwatch.expires(after=0.3, scope="at last"):
    time.sleep(1000)
"""

HANGS = """
import subprocess, time, hangwatch
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


def faults_at(step: str, how: str) -> list[str]:
    """Return the failpoints for one fault at a step."""
    if step.startswith("handover."):
        # There must be somebody to be taken over.
        return ["incident.begun=kill@1", f"{step}={how}@{2 if step in FROM_THE_START else 1}"]
    # The first visits are those of handshakes.
    return [f"{step}={how}@{4 if step.startswith('visit.') else 1}"]


# In `make test` the watcher dies at each step once, and stops at one of each kind.
IN_TURN = {
    f"killed-{kind}": [
        fault for step in STEPS if step.startswith(f"{kind}.") for fault in faults_at(step, "kill")
    ]
    for kind in ("handshake", "visit", "incident", "ladder", "report", "handover")
}
IN_TURN["stopped-first"] = ["handshake.kept=stop@1", "visit.read=stop@4"]
IN_TURN["stopped-later"] = ["ladder.announced=stop@1", *faults_at("handover.visited", "stop")]
# Each fault is met once, whoever asked for it.
IN_TURN = {name: list(dict.fromkeys(faults)) for name, faults in IN_TURN.items()}

ALONE = [
    pytest.param(faults_at(step, how), id=f"{step}-{how}", marks=pytest.mark.long)
    for step in STEPS
    for how in ("kill", "stop")
]


def happened(log: str) -> int:
    """Count the faults; a machine that stands still has watchers replaced that met none."""
    return log.count("hangwatch: failpoint ")


@pytest.mark.parametrize(
    "faults", [*(pytest.param(faults, id=name) for name, faults in IN_TURN.items()), *ALONE]
)
def test_the_watcher_at_a_step(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    faults: list[str],
) -> None:
    """Workers hang, one after the other, until every fault has happened."""
    watcher = start(start_watcher, monkeypatch, ",".join(faults))
    before = open_files(watcher.keeper_pid)
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    log, hung = "", 0
    while happened(log) < len(faults):
        hung += 1
        assert hung <= 1 + len(faults), f"a fault has not happened: {faults}"
        hang_and_be_ended(watcher)
        wait_until(lambda: watcher_below(watcher.keeper_pid), "a watcher")
        log += capfd.readouterr().err
    assert healthy.poll() is None, "the healthy worker was hurt"
    _, said = healthy.communicate("end\n")
    assert healthy.returncode == -signal.SIGKILL, "and was still watched"
    assert not re.search("Traceback|Error", said)
    wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
    assert watcher_below(watcher.keeper_pid) is not None
    watcher.server.stop()
    log += capfd.readouterr().err
    assert happened(log) == len(faults), "each step was reached, once"
    assert "Traceback" not in log
    reported = [report["worker"]["pid"] for report in watcher.reports()]
    assert len(reported) == len(set(reported)) == hung + 1, "each worker is reported once"


def hang_and_be_ended(watcher: RunningWatcher) -> None:
    hangs = watcher.connected_worker(HANGS, stderr=subprocess.DEVNULL)
    child = int(hangs.read_line())
    assert hangs.wait() == -signal.SIGKILL
    hangs.close()
    wait_until(lambda: not is_alive(child), "its child has ended with it")
    report = watcher.report(pid=hangs.pid)
    assert report["scope"]["name"] == "hangs"
    assert report["outcome"] == "reaped"


LONGER = """
import signal, sys, time, hangwatch
signal.signal(signal.SIGTERM, signal.SIG_IGN)
how, grace = sys.argv[1:]
try:
    with hangwatch.expires(0.3, "hangs", on_expiry=how, grace=float(grace)):
        while True: time.sleep(0.01)
except hangwatch.TimerExpired:
    pass
with hangwatch.expires(0.3, "at last", on_expiry="reap", grace=0.0):
    time.sleep(1000)
"""

RAISES = ["incident.reporter", "raise.asked", "report.finished"]
REAPS = ["error-file.written", "ladder.announced", "ladder.sent", "ladder.confirmed"]
# The first time it is SIGTERM's, the second time SIGKILL's.
THE_SECOND_TIME = ["ladder.tree", "ladder.looked", "ladder.announced", "ladder.sent"]


LADDERS = {
    f"{how}-killed": (how, [f"{step}=kill@1" for step in steps])
    for how, steps in (("raise", RAISES), ("reap", REAPS))
}
LADDERS_ALONE = {
    f"{how}-{step}@{nth}-{fault}": (how, [f"{step}={fault}@{nth}"])
    for how, steps, nth in (("raise", RAISES, 1), ("reap", REAPS, 1), ("reap", THE_SECOND_TIME, 2))
    for step in steps
    for fault in ("kill", "stop")
}


@pytest.mark.parametrize(
    ("how", "faults"),
    [
        *(pytest.param(*ladder, id=name) for name, ladder in LADDERS.items()),
        *(
            pytest.param(*one, id=name, marks=pytest.mark.long)
            for name, one in LADDERS_ALONE.items()
        ),
    ],
)
def test_the_watcher_at_a_step_of_a_longer_ladder(
    start_watcher: StartWatcher,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    how: str,
    faults: list[str],
) -> None:
    watcher = start(start_watcher, monkeypatch, ",".join(faults))
    before = open_files(watcher.keeper_pid)
    healthy = watcher.worker(HEALTHY, stdin=subprocess.PIPE)
    log, hung = "", 0
    while happened(log) < len(faults):
        hung += 1
        assert hung <= 1 + len(faults), f"a fault has not happened: {faults}"
        climb_a_longer_ladder(watcher, tmp_path / f"{hung}.json", how)
        wait_until(lambda: watcher_below(watcher.keeper_pid), "a watcher")
        log += capfd.readouterr().err
    assert healthy.poll() is None, "the healthy worker was hurt"
    healthy.communicate("end\n")
    assert healthy.returncode == -signal.SIGKILL, "and was still watched"
    wait_until(lambda: open_files(watcher.keeper_pid) <= before, "nothing is left open")
    watcher.server.stop()
    log += capfd.readouterr().err
    assert happened(log) == len(faults), "each step was reached, once"


def climb_a_longer_ladder(watcher: RunningWatcher, error_file: Path, how: str) -> None:
    environment = watcher.environment(TORCHELASTIC_ERROR_FILE=str(error_file))
    began = time.monotonic()
    # TimerExpired is raised long before its grace has passed; SIGTERM is ignored for all of it.
    grace = 1000.0 if how == "raise" else 0.5
    hangs = watcher.connected_worker(LONGER, how, str(grace), env=environment)
    assert hangs.wait() == -signal.SIGKILL
    assert time.monotonic() - began > 0.3 + (0.3 if how == "raise" else grace)
    hangs.close()
    blocks = ["hangs", "at last"] if how == "raise" else ["hangs"]
    reports = watcher.wait_for_reports(len(blocks), pid=hangs.pid)
    outcomes = [(report["scope"]["name"], report["outcome"]) for report in reports]
    expected = {"hangs": "reaped", "at last": "reaped"}
    expected["hangs"] = "raised" if how == "raise" else "reaped"
    assert sorted(outcomes) == sorted((block, expected[block]) for block in blocks), "each once"
    assert json.loads(error_file.read_text()), "why it died"


def test_whose_next_block_is_overdue_when_a_successor_comes(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block that `TimerExpired` ended is reported as raised, and the next one as reaped."""
    faults = "raise.asked=sleep:1@1,raise.asked=kill@1"
    watcher = start(start_watcher, monkeypatch, faults)
    hangs = watcher.connected_worker(LONGER, "raise", "1000")
    assert hangs.wait() == -signal.SIGKILL
    hangs.close()
    reports = {report["scope"]["name"]: report for report in watcher.wait_for_reports(2)}
    assert reports["hangs"]["outcome"] == "raised"
    assert reports["at last"]["outcome"] == "reaped"
    assert "raise" in [action["action"] for action in reports["hangs"]["actions"]]
    assert "raise" not in [action["action"] for action in reports["at last"]["actions"]]


def test_every_step_has_its_failpoint() -> None:
    source = Path(failpoints.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    assert set(re.findall(r'failpoint\("(.*)"\)', text)) == set(failpoints.NAMES)


def test_every_failpoint_of_the_watcher_is_reached_by_a_test() -> None:
    killed = {fault.partition("=")[0] for faults in IN_TURN.values() for fault in faults}
    assert killed == set(STEPS)
    others = [name for name in failpoints.NAMES if name.startswith(("evidence.", "kernel."))]
    others.append("sentence.carried-out")
    assert {*STEPS, *RAISES, *REAPS, *others} == set(failpoints.NAMES)
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name in others if f"{name}=" not in tests] == []


def run_to_its_end(script: str, **environment: str) -> Worker:
    """Run a script in a process that has imported hangwatch alone, and read its errors."""
    return nursery().fork(
        script, env={**os.environ, **environment}, stdout=None, stderr=subprocess.PIPE
    )


def test_what_is_no_failpoint_is_said() -> None:
    for text, says in (
        ("visit.read", "none of NAME="),
        ("visit.read=explode", "none of NAME="),
        ("visit.red=kill", "there is no 'visit.red'"),
        ("visit.read=fail:EVERY", "no name of an error"),
    ):
        process = run_to_its_end("import hangwatch.failpoints", **{failpoints.VARIABLE: text})
        _, err = process.communicate()
        assert process.returncode == 1
        assert says in err.splitlines()[-1]


def test_no_worker_ever_loads_failpoints() -> None:
    script = (
        "import sys, hangwatch\n"
        "with hangwatch.expires(60, 'x'): pass\n"
        "assert 'hangwatch.failpoints' not in sys.modules\n"
    )
    process = run_to_its_end(script, HANGWATCH_ADDRESS="off")
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_a_promise_of_a_watcher_that_answers_too_late_keeps_nobody_quiet(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has visited the page when the worker gives up: a promise of a minute stands there."""
    watcher = start(start_watcher, monkeypatch, "handshake.watched=sleep:2.5@1")
    away = Path(watcher.address).rename(f"{watcher.address}.away")
    healthy = watcher.worker(
        ARMS_BEFORE_IT_CONNECTS + HEALTHY,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert healthy.read_line() == "armed"
    away.rename(watcher.address)
    _, said = healthy.communicate("end\n")
    assert healthy.returncode == -signal.SIGKILL, "it is watched in the end"
    assert "there is no watcher" in said
    assert "did not answer within 0.3 s" in said


ARMS_BEFORE_IT_CONNECTS = """
import os, hangwatch
from hangwatch.worker import connection
from hangwatch.worker.client import client_at
connection.ANSWER_WITHIN = 0.3
with hangwatch.expires(after=1000, scope="healthy"):
    pass
print("armed", flush=True)
client_at(os.environ["HANGWATCH_ADDRESS"])._warned.clear()  # it warns of each problem once
"""


def test_evidence_that_hangs_holds_up_nothing(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.gathering=sleep:1000")
    with watcher.connected_worker(HANGS) as hangs:
        assert hangs.wait() == -signal.SIGKILL
    report = watcher.report(pid=hangs.pid)
    assert "evidence: not complete within 2 s" in report["missing"]
    helpers = _children(watcher.pid)
    wait_until(lambda: not any(map(is_alive, helpers)), "who gathered it is gone")


def test_a_reporter_that_hangs_holds_up_nothing(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = start(start_watcher, monkeypatch, "evidence.publishing=sleep:1000@1")
    for _ in range(2):
        with watcher.connected_worker(HANGS) as hangs:
            assert hangs.wait() == -signal.SIGKILL
    assert watcher.report(pid=hangs.pid)["outcome"] == "reaped", "the second is reported"
    # The watcher would not end before it has given up.
    for reporter in _children(watcher.pid):
        with contextlib.suppress(ProcessLookupError):  # the second one has ended meanwhile
            os.kill(reporter, signal.SIGKILL)


def _children(parent: int) -> list[int]:
    return [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == parent
    ]


def _parent(pid: int) -> int:
    stat = read_stat(pid)
    return 0 if stat is None else stat.ppid


@pytest.mark.parametrize("pidfds", ["by the kernel", "by number"])
def test_a_kernel_without_pidfds_of_sockets(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, pidfds: str
) -> None:
    """Before Linux 6.5 a peer is held by its number, and the keeper keeps the pidfd."""
    what = "kernel.peer-pidfd=fail:ENOPROTOOPT" if pidfds == "by number" else ""
    watcher = start(start_watcher, monkeypatch, what)
    script = HANGS.replace("\nwith", "\ninput()\nwith")
    with watcher.connected_worker(script, stdin=subprocess.PIPE) as hangs:
        hangs.read_line()
        kept = [os.readlink(path) for path in Path(f"/proc/{watcher.keeper_pid}/fd").iterdir()]
        # Its own watcher, and the worker.
        assert kept.count("anon_inode:[pidfd]") == (1 if pidfds == "by the kernel" else 2)
        os.kill(watcher.pid, signal.SIGKILL)
        hangs.write_line()
        assert hangs.wait() == -signal.SIGKILL
    assert watcher.report(pid=hangs.pid)["outcome"] == "reaped"
