"""What a block chooses about its overrun, what the server says, and which of them holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import hangwatch
from support import namespaces
from support.processes import is_alive
from support.watchers import RunningWatcher, StartWatcher, wait_until

HANG = """
import signal, sys, time, hangwatch
choices = eval(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: print("SIGUSR1", flush=True))
try:
    with hangwatch.expires(0.3, "choice", **choices):
        time.sleep(float(sys.argv[2]))
except hangwatch.TimerExpired:
    print("TimerExpired", flush=True)
"""


def hang(watcher: RunningWatcher, seconds: float = 1000, **choices: Any) -> tuple[int, str, str]:
    """Overrun a block with such choices; return status, output, and the report's outcome."""
    worker = watcher.worker(HANG, repr(choices), str(seconds))
    out, _ = worker.communicate(timeout=40)
    return worker.returncode, out, watcher.report(pid=worker.pid)["outcome"]


@pytest.mark.parametrize(
    ("server", "block", "ending"),
    [
        ("reap", None, (-9, "", "reaped")),
        ("reap", "report", (0, "", "reported")),
        ("reap", "raise", (0, "TimerExpired\n", "raised")),
        ("raise", None, (0, "TimerExpired\n", "raised")),
        ("raise", "report", (0, "", "reported")),
        ("raise", "reap", (-9, "", "reaped")),
        ("report", None, (0, "", "reported")),
        ("report", "reap", (-9, "", "reaped")),
        ("report", "raise", (0, "TimerExpired\n", "raised")),
    ],
)
def test_the_block_s_choice_comes_before_the_server_s(
    start_watcher: StartWatcher, server: str, block: str | None, ending: tuple[int, str, str]
) -> None:
    watcher = start_watcher(on_expiry=server)
    choices = {} if block is None else {"on_expiry": block}
    seconds = 6.0 if ending[2] == "reported" else 1000
    assert hang(watcher, seconds, **choices) == ending


@pytest.mark.parametrize("block", ["reap", "raise"])
def test_a_server_that_forces_report_never_kills(start_watcher: StartWatcher, block: str) -> None:
    watcher = start_watcher(on_expiry="report", force=True)
    assert hang(watcher, 6.0, on_expiry=block) == (0, "", "reported")


def test_run_with_on_expiry_report_never_kills(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hangwatch", "run"),
            *("--on-expiry", "report", "--report-dir", str(tmp_path), "--"),
            *(sys.executable, "-c", HANG, "{'on_expiry': 'reap'}", "6.0"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "")
    assert "reported only, left alone" in result.stderr


@pytest.mark.parametrize(
    ("stacks", "why"),
    [(True, "only a worker that is about to be killed is asked"), (False, "told not to ask")],
)
def test_report_sends_no_signal_at_all(start_watcher: StartWatcher, stacks: bool, why: str) -> None:
    watcher = start_watcher(on_expiry="report", stacks=stacks)
    script = """
import signal, time, hangwatch
# Whatever comes from now on waits in a queue that nobody reads.
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
with hangwatch.expires(0.3, "deaf"): time.sleep(5)
print(signal.sigpending())
"""
    worker = watcher.worker(script)
    out, _ = worker.communicate(timeout=30)
    assert out == "set()\n"
    report = watcher.report(pid=worker.pid)
    assert report["actions"] == report["threads"] == []
    assert any(why in reason for reason in report["missing"]), report["missing"]
    assert report["process"]["state"] == "S", "what the kernel knows is there"


def test_a_block_s_grace_and_signal(watcher: RunningWatcher) -> None:
    status, out, outcome = hang(watcher, grace=0.5, signal=int(signal.SIGUSR1))
    assert (status, out, outcome) == (-9, "SIGUSR1\n", "reaped")
    (report,) = [r for r in watcher.reports() if r["actions"] and "USR1" in str(r["actions"])]
    first, second, _ = report["actions"]
    assert (first["action"], second["action"]) == ("SIGUSR1", "SIGKILL")
    assert second["at_s"] - first["at_s"] >= 0.5


def test_a_block_s_grace_means_sigterm_first(watcher: RunningWatcher) -> None:
    assert hang(watcher, grace=20) == (-15, "", "reaped")


def test_a_block_may_do_without_the_server_s_grace(start_watcher: StartWatcher) -> None:
    assert hang(start_watcher(grace=20), grace=0) == (-9, "", "reaped")


def test_a_server_s_signal(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(grace=0.5, signal=signal.SIGUSR1)
    assert hang(watcher) == (-9, "SIGUSR1\n", "reaped")
    assert hang(watcher, signal=int(signal.SIGINT))[0] == -2, "the block's comes first"


def test_options_of_a_server_are_checked() -> None:
    for options, error in (
        ({"on_expiry": "kill"}, ValueError),
        ({"grace": -1}, ValueError),
        ({"signal": "TERM"}, TypeError),
        ({"signal": 99}, ValueError),
        ({"gap": 0}, ValueError),
        ({"gap": "1"}, TypeError),
        ({"on_event": 3}, TypeError),
        ({"stack": False}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            hangwatch.SharedMemoryTimerServer(**options)


def test_the_report_names_the_whole_chain_of_open_scopes(watcher: RunningWatcher) -> None:
    """The outer block overruns because of what hangs inside of it: the report says where."""
    worker = watcher.worker(
        """
import threading, time, hangwatch
def other():
    with hangwatch.expires(60, "unrelated"): time.sleep(1000)
threading.Thread(target=other, daemon=True).start()
with hangwatch.expires(60, "epoch"), hangwatch.expires(0.5, "step"):
    with hangwatch.expires(60, "forward"), hangwatch.expires(60, "all_reduce"): time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    scope = watcher.report(pid=worker.pid)["scope"]
    assert (scope["name"], scope["enclosing"]) == ("step", ["epoch"])
    assert scope["within"] == ["all_reduce", "forward"]
    (text,) = watcher.report_dir.glob(f"*-{worker.pid}/report.txt")
    assert "overran 'step': " in text.read_text()
    assert "now in 'all_reduce'" in text.read_text()
    assert "inside:  all_reduce in forward in step (overran) in epoch\n" in text.read_text()


def test_the_chain_of_an_asyncio_task_is_its_own(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import asyncio, hangwatch
async def task(n, after):
    async with hangwatch.expires(60, f"outer {n}"), hangwatch.expires(after, f"task {n}"):
        await asyncio.sleep(0.01)
        async with hangwatch.expires(60, f"inner {n}"): await asyncio.sleep(1000)
async def main(): await asyncio.gather(task(1, 60), task(2, 0.5), task(3, 60))
asyncio.run(main())
""",
    )
    worker.communicate(timeout=30)
    scope = watcher.report(pid=worker.pid)["scope"]
    assert scope["name"] == "task 2"
    assert (scope["within"], scope["enclosing"]) == (["inner 2"], ["outer 2"])


def test_a_renewed_block_that_overruns(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import time, hangwatch
with hangwatch.expires(0.5, "heart") as timer:
    for _ in range(10): time.sleep(0.15); timer.renew()
    timer.renew(0.3)
    time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    report = watcher.report(pid=worker.pid)
    scope = report["scope"]
    assert scope["inside_s"] > 1.5 + 0.3 - 0.01, "since it was entered"
    assert 0.29 < scope["since_renewal_s"] < 5
    assert scope["limit_s"] == pytest.approx(0.3)
    assert "s since it was renewed" in report["headline"]


def test_who_renews_or_cancels_in_time_lives(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import threading, time, hangwatch
with hangwatch.expires(1.0, "renewed") as timer:
    def beat():
        for _ in range(5): time.sleep(0.4); timer.renew()
    heart = threading.Thread(target=beat); heart.start(); heart.join()
with hangwatch.expires(0.5, "cancelled") as timer:
    timer.cancel()
    time.sleep(1.5)
with hangwatch.expires(60, "shortened") as timer:
    timer.renew(0.5)
    time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    watcher.report(pid=worker.pid)
    reports = [r for r in watcher.reports() if r["worker"]["pid"] == worker.pid]
    assert [r["scope"]["name"] for r in reports] == ["shortened"]
    assert reports[0]["scope"]["late_s"] < 20, "a nearer deadline rings"


TREE = """
import os, subprocess, sys, time, hangwatch
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
with hangwatch.expires(0.5, "family", grace=0.2): time.sleep(1000)
"""


def test_descendants_are_found_before_the_first_step(watcher: RunningWatcher) -> None:
    """The worker dies of SIGTERM, and its child would be nobody's: it was found before."""
    worker = watcher.worker(TREE)
    assert worker.stdout is not None
    child = int(worker.stdout.readline())
    assert worker.wait(30) == -15
    report = watcher.report(pid=worker.pid)
    wait_until(lambda: not is_alive(child), "the child is dead")
    assert report["actions"][-1] == {
        **report["actions"][-1],
        "action": f"SIGKILL to descendant {child}",
        "result": "sent; it is dead",
    }
    worker.stdout.close()


def test_run_takes_signal_names(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "hangwatch", "run", "--report-dir", str(tmp_path)),
                *(*options, "--", sys.executable, "-c", HANG, "{}", "1000"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    for name in ("usr1", "SIGUSR1", str(int(signal.SIGUSR1))):
        result = run("--signal", name, "--grace", "0.3")
        assert (result.returncode, result.stdout) == (128 + 9, "SIGUSR1\n")
    assert run("--signal", "SIGNONE").returncode == 125
    assert "is no signal's name or number" in run("--signal", "0").stderr
    assert os.listdir(tmp_path)


def test_a_signal_without_any_grace(watcher: RunningWatcher) -> None:
    began = time.monotonic()
    assert hang(watcher, signal=int(signal.SIGCONT), grace=0)[0] == -9
    assert time.monotonic() - began < 4.5, "the usual grace, 5 s, is not waited for"


def test_who_ends_late_and_exits_is_slow_and_did_not_die(start_watcher: StartWatcher) -> None:
    """Blocks that end around their verdict, and the program right after."""
    watcher = start_watcher()
    script = """
import os, sys, time, hangwatch
with hangwatch.expires(0.3, "last"): time.sleep(0.3 + float(sys.argv[1]))
os._exit(0)
"""
    statuses = {}
    for late in (0.004, 0.008, 0.015, 0.03, 0.06):
        worker = watcher.worker(script, str(late))
        worker.communicate(timeout=30)
        statuses[worker.pid] = worker.returncode
    watcher.server.stop()
    found = {report["worker"]["pid"]: report["outcome"] for report in watcher.reports()}
    assert "recovered" in found.values()
    assert "; slow, not hung: the block has ended, at most" in str(watcher.reports())
    for pid, outcome in found.items():
        assert outcome == ("recovered" if statuses[pid] == 0 else "reaped")


def test_in_a_pid_namespace_of_its_own_the_main_thread_is_known(watcher: RunningWatcher) -> None:
    prefix = namespaces.prefix()
    if prefix is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    script = """
import time, hangwatch
time.sleep(0.1)
try:
    with hangwatch.expires(0.4, "inside", on_expiry="raise", grace=20): time.sleep(1000)
except hangwatch.TimerExpired: print("raised")
"""
    command = [*prefix, sys.executable, "-c", script]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=watcher.environment()
    )
    assert (result.returncode, result.stdout) == (0, "raised\n"), result.stderr
