"""What a block chooses about its overrun, what the server says, and which of them holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import namespaces
from support.nursery import LIMIT, Worker
from support.processes import is_alive
from support.watchers import CONNECT, RunningWatcher, StartWatcher, wait_until

# A block may be left at a line of input; there are as many blocks as its second argument says.
HANG = """
import os, signal, sys, hangwatch
choices = eval(sys.argv[1])
def end(*_):
    print("SIGUSR1", flush=True)
    os._exit(3)
signal.signal(signal.SIGUSR1, end)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
for _ in range(int(sys.argv[2])):
    try:
        with hangwatch.expires(0.3, "choice", **choices):
            sys.stdin.readline()
    except hangwatch.TimerExpired:
        print("TimerExpired", flush=True)
"""


def hang(watcher: RunningWatcher, blocks: int = 1, **choices: Any) -> Worker:
    """Start a worker that overruns blocks with such choices."""
    return watcher.connected_worker(HANG, repr(choices), str(blocks), stdin=subprocess.PIPE)


def ending(watcher: RunningWatcher, worker: Worker, blocks: int = 1) -> tuple[int, str, str]:
    """Have a worker leave its blocks when they were reported; return status, output, outcome.

    The next block's report comes when all is over that the one before it led to.
    """
    for count in range(1, blocks + 1):
        reports = watcher.wait_for_reports(count, pid=worker.pid)
        if worker.poll() is None and reports[-1]["outcome"] == "reported":
            worker.write_line()
    out, _ = worker.communicate()
    (outcome,) = {report["outcome"] for report in watcher.reports(pid=worker.pid)}
    return worker.returncode, out, outcome


REAPED, RAISED, REPORTED = (-9, "", "reaped"), (0, "TimerExpired\n", "raised"), (0, "", "reported")


@pytest.mark.parametrize("server", ["reap", "raise", "report"])
def test_the_block_s_choice_comes_before_the_server_s(
    watcher: RunningWatcher, watcher_with: StartWatcher, server: str
) -> None:
    endings = {"reap": REAPED, "raise": RAISED, "report": REPORTED}
    if server != "reap":  # the default
        watcher = watcher_with(on_expiry=server)
    silent = hang(watcher)
    workers = {choice: hang(watcher, on_expiry=choice) for choice in endings}
    assert ending(watcher, silent) == endings[server]
    assert {choice: ending(watcher, worker) for choice, worker in workers.items()} == endings


def test_a_server_that_forces_report_never_kills(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(on_expiry="report", force=True)
    for worker in [hang(watcher, 2, on_expiry=block) for block in ("reap", "raise")]:
        assert ending(watcher, worker, 2) == REPORTED
        assert [report["actions"] for report in watcher.reports(pid=worker.pid)] == [[], []]


def test_run_with_on_expiry_report_never_kills(tmp_path: Path) -> None:
    script = """
import sys, hangwatch
for _ in range(2):
    with hangwatch.expires(0.3, on_expiry="reap"): sys.stdin.readline()
"""
    command = [
        *(sys.executable, "-m", "hangwatch", "run"),
        *("--on-expiry", "report", "--report-dir", str(tmp_path), "--"),
        *(sys.executable, "-c", CONNECT + script),
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) as run:
        for count in (1, 2):
            wait_until(lambda: len([*tmp_path.glob("[!.]*")]) == count, "the report")  # noqa: B023
            assert run.stdin is not None
            print(file=run.stdin, flush=True)
        _, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 0
    assert err.count("reported only, left alone") == 2


@pytest.mark.parametrize(
    ("stacks", "why"),
    [(True, "only a worker that is about to be killed is asked"), (False, "told not to ask")],
)
def test_report_sends_no_signal_at_all(watcher_with: StartWatcher, stacks: bool, why: str) -> None:
    watcher = watcher_with(on_expiry="report", stacks=stacks)
    script = """
import signal, sys, hangwatch
# Whatever comes from now on waits in a queue that nobody reads.
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for _ in range(2):
    with hangwatch.expires(0.3, "deaf"): sys.stdin.readline()
print(signal.sigpending())
"""
    worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
    assert ending(watcher, worker, 2) == (0, "set()\n", "reported")
    for report in watcher.reports(pid=worker.pid):
        assert report["actions"] == report["threads"] == []
        assert any(why in reason for reason in report["missing"]), report["missing"]
        assert report["process"]["state"] == "S", "what the kernel knows is there"


def actions(report: dict[str, Any]) -> list[str]:
    return [action["action"] for action in report["actions"]]


def test_a_block_s_grace_and_signal(watcher: RunningWatcher) -> None:
    ignores = hang(watcher, grace=0.5, signal=int(signal.SIGUSR2))
    obeys = hang(watcher, grace=LIMIT, signal=int(signal.SIGUSR1))
    has_no_grace = hang(watcher, signal=int(signal.SIGUSR2), grace=0)
    assert ending(watcher, ignores) == (-9, "", "reaped")
    report = watcher.report(pid=ignores.pid)
    assert actions(report) == ["SIGUSR2", "SIGKILL", "confirm"]
    assert report["actions"][1]["at_s"] - report["actions"][0]["at_s"] >= 0.5
    assert ending(watcher, obeys) == (3, "SIGUSR1\n", "reaped")
    assert actions(watcher.report(pid=obeys.pid)) == ["SIGUSR1", "confirm"]
    assert ending(watcher, has_no_grace) == (-9, "", "reaped")
    assert actions(watcher.report(pid=has_no_grace.pid)) == ["SIGUSR2", "SIGKILL", "confirm"]


def test_a_block_s_grace_means_sigterm_first(watcher: RunningWatcher) -> None:
    assert ending(watcher, hang(watcher, grace=LIMIT)) == (-15, "", "reaped")


def test_a_block_may_do_without_the_server_s_grace(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(grace=LIMIT)
    assert ending(watcher, hang(watcher, grace=0)) == REAPED


def test_a_server_s_signal(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(grace=LIMIT, signal=signal.SIGUSR1)
    servers, own = hang(watcher), hang(watcher, signal=int(signal.SIGTERM))
    assert ending(watcher, servers) == (3, "SIGUSR1\n", "reaped")
    assert ending(watcher, own) == (-15, "", "reaped"), "the block's comes first"


def test_the_report_names_the_whole_chain_of_open_scopes(watcher: RunningWatcher) -> None:
    """The outer block overruns because of what hangs inside of it: the report says where."""
    worker = watcher.connected_worker(
        """
import threading, time, hangwatch
def other():
    with hangwatch.expires(1000, "unrelated"): inside.set(); time.sleep(1000)
inside = threading.Event()
threading.Thread(target=other, daemon=True).start()
inside.wait()
with hangwatch.expires(1000, "epoch"), hangwatch.expires(1000, "step") as step:
    with hangwatch.expires(1000, "forward"), hangwatch.expires(1000, "all_reduce"):
        step.renew(0.3)
        time.sleep(1000)
""",
    )
    assert worker.wait() == -9
    scope = watcher.report(pid=worker.pid)["scope"]
    assert (scope["name"], scope["enclosing"]) == ("step", ["epoch"])
    assert scope["within"] == ["all_reduce", "forward"]
    (text,) = watcher.report_dir.glob(f"*-{worker.pid}/report.txt")
    assert "overran 'step': " in text.read_text()
    assert "now in 'all_reduce'" in text.read_text()
    assert "inside:  all_reduce in forward in step (overran) in epoch\n" in text.read_text()


def test_the_chain_of_an_asyncio_task_is_its_own(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import asyncio, hangwatch
async def task(n):
    async with hangwatch.expires(1000, f"outer {n}"), hangwatch.expires(1000, f"task {n}") as timer:
        await asyncio.sleep(0.01)
        async with hangwatch.expires(1000, f"inner {n}"):
            await inside.wait()  # for all of them
            if n == 2: timer.renew(0.3)
            await asyncio.sleep(1000)
async def main():
    tasks = asyncio.gather(task(1), task(2), task(3))
    await asyncio.sleep(0.1)
    inside.set()
    await tasks
inside = asyncio.Event()
asyncio.run(main())
""",
    )
    assert worker.wait() == -9
    scope = watcher.report(pid=worker.pid)["scope"]
    assert scope["name"] == "task 2"
    assert (scope["within"], scope["enclosing"]) == (["inner 2"], ["outer 2"])


def test_a_renewed_block_that_overruns(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import time, hangwatch
with hangwatch.expires(1000, "heart") as timer:
    for _ in range(2): time.sleep(0.2); timer.renew()
    timer.renew(0.3)
    time.sleep(1000)
""",
    )
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    scope = report["scope"]
    assert scope["since_renewal_s"] > 0.29
    assert scope["inside_s"] > scope["since_renewal_s"] + 0.4 - 0.01, "since it was entered"
    assert scope["limit_s"] == pytest.approx(0.3)
    assert "s since it was renewed" in report["headline"]


def test_a_worker_that_renews_or_cancels_in_time_lives(watcher: RunningWatcher) -> None:
    """Both are due before the third block is, which the watcher deals with later, then."""
    worker = watcher.connected_worker(
        """
import threading, time, hangwatch
renewed = hangwatch.expires(1000, "renewed").__enter__()
cancelled = hangwatch.expires(1000, "cancelled").__enter__()
with hangwatch.paused("nobody is due yet", 1000):
    renewed.renew(0.1)
    cancelled.renew(0.1)
    heart = threading.Thread(target=renewed.renew, args=[1000])
    heart.start()
    heart.join()
    cancelled.cancel()
with hangwatch.expires(1e6, "shortened") as timer:
    timer.renew(0.5)  # the watcher would look in 1000 s, if this did not ring
    time.sleep(1000)
""",
    )
    assert worker.wait() == -9
    watcher.report(pid=worker.pid)
    scopes = [report["scope"]["name"] for report in watcher.reports(pid=worker.pid)]
    assert scopes == ["shortened"]


SKIPPED = """
import sys, hangwatch
with hangwatch.paused("nobody is due yet", 1000):
    earlier = hangwatch.expires(1000, "earlier").__enter__()
    later = hangwatch.expires(0.3, "later").__enter__()
    earlier.__exit__(None, None, None)
sys.stdin.readline()
later.renew(0.3)
sys.stdin.readline()
"""


def test_a_block_that_was_skipped_is_reported_and_one_that_is_renewed_is_judged(
    watcher: RunningWatcher,
) -> None:
    worker = watcher.connected_worker(SKIPPED, stdin=subprocess.PIPE)
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reported"
    assert "it was skipped, not hung" in report["actions"][-1]["result"]
    worker.write_line()
    assert worker.wait() == -9
    last = watcher.wait_for_reports(2, pid=worker.pid)[-1]
    assert (last["outcome"], last["scope"]["name"]) == ("reaped", "later")


TREE = """
import os, subprocess, sys, time, hangwatch
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
with hangwatch.expires(0.3, "family", grace=1000): time.sleep(1000)
"""


def test_descendants_are_found_before_the_first_step(watcher: RunningWatcher) -> None:
    """The worker dies of SIGTERM, and its child would be nobody's: it was found before."""
    worker = watcher.connected_worker(TREE)
    child = int(worker.read_line())
    assert worker.wait() == -15
    report = watcher.report(pid=worker.pid)
    wait_until(lambda: not is_alive(child), "the child is dead")
    assert report["actions"][-1] == {
        **report["actions"][-1],
        "action": f"SIGKILL to descendant {child}",
        "result": "sent; it is dead",
    }


def test_run_takes_signal_names(tmp_path: Path) -> None:
    from hangwatch.cli.commands import _Signal

    for name in ("usr1", "USR1", "SIGUSR1", "sigusr1", str(int(signal.SIGUSR1))):
        assert _Signal().convert(name, None, None) == signal.SIGUSR1

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hangwatch", "run", "--report-dir", str(tmp_path)]
        hangs = [sys.executable, "-c", CONNECT + HANG, "{}", "1"]
        nothing_to_read, open_end = os.pipe()
        try:
            return subprocess.run(
                [*command, *options, "--", *hangs],
                stdin=nothing_to_read,
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            os.close(nothing_to_read)
            os.close(open_end)

    result = run("--signal", "usr1", "--grace", str(LIMIT))
    assert (result.returncode, result.stdout) == (3, "SIGUSR1\n")
    assert len(list(tmp_path.iterdir())) == 1
    result = run("--signal", "0")
    assert result.returncode == 125
    assert "is no signal's name or number" in result.stderr


def test_in_a_pid_namespace_of_its_own_the_main_thread_is_known(watcher: RunningWatcher) -> None:
    prefix = namespaces.prefix()
    if prefix is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    script = """
import time, hangwatch
try:
    with hangwatch.expires(0.3, "inside", on_expiry="raise", grace=1000): time.sleep(1000)
except hangwatch.TimerExpired: print("raised")
"""
    command = [*prefix, sys.executable, "-c", CONNECT + script]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=watcher.environment()
    )
    assert (result.returncode, result.stdout) == (0, "raised\n"), result.stderr
