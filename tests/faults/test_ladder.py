"""From verdict to death: what is killed, what is spared, and how it is confirmed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from hangwatch import failpoints
from support.namespaces import run_alone
from support.nursery import LIMIT, Worker
from support.processes import is_alive
from support.watchers import CONNECT, RunningWatcher, StartWatcher, first_recovered, wait_until


def actions(report: dict[str, Any]) -> list[str]:
    return [action["action"] for action in report["actions"]]


def test_sigkill_at_once_without_a_grace(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
with hangwatch.expires(0.3, "no grace"): time.sleep(1000)
""",
    )
    out, _ = worker.communicate()
    assert (worker.returncode, out) == (-9, "")
    assert actions(watcher.report(pid=worker.pid)) == ["SIGKILL", "confirm"]


def test_sigterm_and_a_grace_for_a_worker_that_ends_by_itself(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(grace=1000)
    worker = watcher.connected_worker(
        """
import signal, sys, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
with hangwatch.expires(0.3, "gentle"): time.sleep(1000)
""",
    )
    assert worker.wait() == 3
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reaped"
    assert actions(report) == ["SIGTERM", "confirm"]


def test_a_worker_that_leaves_the_block_on_sigterm_and_goes_on_is_left_alone(
    watcher: RunningWatcher,
) -> None:
    script = """
import signal, sys, time, hangwatch
class Stop(Exception): pass
def stop(*_): raise Stop
signal.signal(signal.SIGTERM, stop)
try:
    with hangwatch.expires(0.3, "brief", grace=1): time.sleep(1000)
except Stop: pass
sys.stdin.readline()
"""
    worker, report = first_recovered(
        watcher, lambda: watcher.connected_worker(script, stdin=subprocess.PIPE)
    )
    worker.communicate("end\n")
    assert worker.returncode == 0
    assert actions(report) == ["SIGTERM", "look"]
    assert "; after SIGTERM: the block has ended, at most" in report["headline"]


def test_sigkill_after_the_grace_for_a_worker_that_ignores_sigterm(watcher: RunningWatcher) -> None:
    worker = watcher.connected_worker(
        """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with hangwatch.expires(0.3, "deaf", grace=0.5): time.sleep(1000)
""",
    )
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    assert actions(report) == ["SIGTERM", "SIGKILL", "confirm"]
    assert report["actions"][1]["at_s"] - report["actions"][0]["at_s"] >= 0.5


@pytest.mark.parametrize("then", ["sys.stdin.readline()", "os._exit(0)"], ids=["lives", "exits"])
def test_a_worker_that_leaves_the_block_during_the_evidence_is_recovered(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """A block that ends after its verdict: killed before its end, or not at all."""
    events: Queue[str] = Queue()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "incident.gathered=sleep:1")
        watcher = start_watcher(on_event=lambda event: events.put(event["event"]))
    script = f"""
import os, sys, hangwatch
with hangwatch.expires(0.3, "late"): sys.stdin.readline()
{then}
"""

    def start() -> Worker:
        worker = watcher.connected_worker(script, stdin=subprocess.PIPE)
        while events.get(timeout=LIMIT) != "expired":
            pass
        worker.write_line()
        return worker

    worker, report = first_recovered(watcher, start)
    assert actions(report) == ["look"]
    assert "; slow, not hung: the block has ended, at most" in report["headline"]
    worker.communicate("end\n")
    assert worker.returncode == 0
    watcher.server.stop()
    assert len(watcher.reports(pid=worker.pid)) == 1


FAMILY = """
import subprocess, time, hangwatch
command = "sh -c 'sleep 1000 & echo $$ $!; wait' & wait"
child = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline(), flush=True)
with hangwatch.expires(0.3, "family"): time.sleep(1000)
"""


@pytest.mark.parametrize("tree", [True, False])
def test_descendants_are_killed_with_their_worker_unless_told_not_to(
    watcher_with: StartWatcher, tree: bool
) -> None:
    watcher = watcher_with() if tree else watcher_with(tree=False)
    worker = watcher.connected_worker(FAMILY, stderr=subprocess.DEVNULL)
    family = [int(pid) for pid in worker.read_line().split()]
    assert len(family) == 3
    assert worker.wait() == -9
    report = watcher.report(pid=worker.pid)
    killed = [action for action in report["actions"] if "descendant" in action["action"]]
    try:
        if tree:
            wait_until(lambda: not any(map(is_alive, family)), "the descendants are dead")
            assert len(killed) == 3
            assert all(action["result"].endswith("it is dead") for action in killed)
        else:
            assert all(map(is_alive, family))
            assert killed == []
    finally:
        for pid in family:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


SPARED = """
import os, tempfile, time
from pathlib import Path
import hangwatch
from support.watchers import CONNECT, RunningWatcher

# A worker whose child is a worker, too, with a child of its own: both are spared.
WORKER = '''
import os, subprocess, sys, time, hangwatch
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    grandchild = subprocess.Popen(["sleep", "1000"]).pid
    with hangwatch.expires(1000, 'child'):
        exec(CONNECT)
        os.write(writing, b"%d" % grandchild); time.sleep(1000)
other = subprocess.Popen(["sleep", "1000"])
print(child, int(os.read(reading, 100)), other.pid, flush=True)
with hangwatch.expires(0.5, "parent"): time.sleep(1000)
'''
with tempfile.TemporaryDirectory() as folder:
    with hangwatch.serve(report_dir=folder) as server:
        # The watcher itself descends from this process, which is a worker as well.
        watcher = RunningWatcher(server, Path(folder))
        worker = watcher.connected_worker(f"CONNECT = {CONNECT!r}" + WORKER)
        child, grandchild, other = map(int, worker.read_line().split())
        assert worker.wait() == -9
        report = watcher.report(pid=worker.pid)
        alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and \\
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        assert alive(child), "a watched worker was killed with its parent"
        assert alive(grandchild), "a watched worker's child was killed"
        assert not alive(other)
        killed = [a["action"] for a in report["actions"] if "descendant" in a["action"]]
        assert killed == [f"SIGKILL to descendant {other}"], killed
        os.kill(child, 9); os.kill(grandchild, 9)
print("held")
"""


def test_watched_descendants_are_spared() -> None:
    assert "held" in run_alone(SPARED)


ROOT_HANGS = """
import subprocess, sys, tempfile
from pathlib import Path
from support.watchers import CONNECT, wait_until
import json

folder = tempfile.mkdtemp()
PROGRAM = f'''
import sys, time, hangwatch
with hangwatch.serve(report_dir=sys.argv[1]) as server:
    exec({CONNECT!r})
    with hangwatch.expires(0.3, "the launcher"): time.sleep(1000)
'''
root = subprocess.Popen([sys.executable, "-c", PROGRAM, folder])
def watchers():
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [stat for stat in stats if "(hw-watcher) " in stat and "(hw-watcher) Z" not in stat]
wait_until(watchers, "the watcher shows under its name")
assert root.wait() == -9
wait_until(lambda: list(Path(folder).glob("[!.]*/report.json")), "a report")
(path,) = Path(folder).glob("[!.]*/report.json")
report = json.loads(path.read_text())
assert report["outcome"] == "reaped"
assert not [a for a in report["actions"] if "descendant" in a["action"]], report["actions"]
wait_until(lambda: not watchers(), "the watcher ends with the program that launched it")
print("held")
"""


def test_a_launcher_that_hangs_is_reaped_and_its_watcher_lives_to_tell() -> None:
    assert "held" in run_alone(ROOT_HANGS)


UNFENCED = """
import mmap, os, socket, struct, sys, time
sys.path[:0] = sys.argv[2:]
from support.raw_worker import connect, hello, memfd
from hangwatch.page import layout
descriptor = memfd()
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor, fenced=False)], [descriptor])
    connection.recv(100)
    memory = mmap.mmap(descriptor, layout.PAGE_BYTES)
    words = memoryview(memory).cast("d")
    words[layout.SLOTS_IN_USE] = 1.0
    words[layout.deadline_word(0) + layout.ENTRY] = 1.0
    words[layout.deadline_word(0)] = time.monotonic() + 0.2
    time.sleep(1000)  # never rings
"""


def test_a_worker_that_the_fence_does_not_reach_is_swept(watcher: RunningWatcher) -> None:
    worker = watcher.worker(UNFENCED, watcher.address, *filter(None, sys.path))
    assert worker.wait() == -9
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"


MOVED = """
import mmap, os, socket, sys, time
sys.path[:0] = sys.argv[2:]
from support.raw_worker import connect, hello, memfd
from hangwatch.page import layout
descriptor = memfd()
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
    connection.recv(100)
    words = memoryview(mmap.mmap(descriptor, layout.PAGE_BYTES)).cast("d")
    words[layout.SLOTS_IN_USE] = 1.0
    words[layout.deadline_word(0) + layout.LIMIT] = 0.2
    words[layout.deadline_word(0) + layout.ENTRY] = 1.0
    for _ in range(2):
        words[layout.deadline_word(0)] = time.monotonic() + 0.2
        connection.send(b"!")
        sys.stdin.readline()
"""


def test_a_block_whose_deadline_has_moved_is_judged_anew(watcher_with: StartWatcher) -> None:
    """As one does whose first ring took longer than its limit; the entry is the same."""
    watcher = watcher_with(on_expiry="report")
    worker = watcher.worker(MOVED, watcher.address, *filter(None, sys.path), stdin=subprocess.PIPE)
    for count in (1, 2):
        watcher.wait_for_reports(count, pid=worker.pid)
        worker.write_line()
    assert worker.wait() == 0
    assert len(watcher.reports(pid=worker.pid)) == 2


def test_many_hangs_at_once_are_all_ended(watcher: RunningWatcher) -> None:
    script = """
import sys, time, hangwatch
print(flush=True)
sys.stdin.readline()
with hangwatch.expires(0.3, "many"): time.sleep(1000)
"""
    workers = [watcher.connected_worker(script, stdin=subprocess.PIPE) for _ in range(12)]
    for worker in workers:
        worker.read_line()
    for worker in workers:
        worker.write_line()
    assert {worker.wait() for worker in workers} == {-9}
    assert {watcher.report(pid=worker.pid)["outcome"] for worker in workers} == {"reaped"}


class TestFrozen:
    """A process that SIGKILL does not end: one in a frozen cgroup (v1), as good as state D."""

    ROOT = Path("/sys/fs/cgroup/freezer")

    @pytest.fixture
    def freezer(self) -> Iterator[Path]:
        group = self.ROOT / f"hangwatch-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            pytest.skip("no cgroup v1 freezer to make a process unkillable with")
        yield group
        (group / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (group / "tasks").read_text(), "the frozen process is gone")
        group.rmdir()

    def test_unkillable_is_said_once_and_it_is_killed_when_that_is_possible(
        self, watcher: RunningWatcher, freezer: Path
    ) -> None:
        script = """
import time, hangwatch
with hangwatch.expires(1, "frozen"): print(flush=True); time.sleep(1000)
"""

        def freeze_one() -> Worker:
            while True:
                worker = watcher.connected_worker(script)
                worker.read_line()
                (freezer / "tasks").write_text(str(worker.pid))
                (freezer / "freezer.state").write_text("FROZEN")
                if not watcher.reports(pid=worker.pid) and worker.poll() is None:
                    return worker
                # On a busy machine it may have died before.
                (freezer / "freezer.state").write_text("THAWED")

        worker = freeze_one()
        report = watcher.report(pid=worker.pid)
        assert report["outcome"] == "unkillable"
        assert report["process"]["state"] in ("D", "S")
        assert report["missing"], "and why there are no stacks"
        self.hang(watcher)
        (freezer / "freezer.state").write_text("THAWED")
        assert worker.wait() == -9
        self.hang(watcher)
        assert len(watcher.reports(pid=worker.pid)) == 1

    def hang(self, watcher: RunningWatcher) -> None:
        """Let the watcher do something else meanwhile."""
        worker = watcher.connected_worker(
            "import time, hangwatch\nwith hangwatch.expires(0.3, 'other'): time.sleep(1000)"
        )
        assert watcher.report(pid=worker.pid)["outcome"] == "reaped"


def test_a_watcher_with_no_descriptor_left_still_kills(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    pid = watcher.pid
    worker = watcher.connected_worker(
        """
import sys, time, hangwatch
with hangwatch.expires(1000, "x") as timer:
    print(flush=True); sys.stdin.readline()
    timer.renew(0.3); time.sleep(1000)
""",
        stdin=subprocess.PIPE,
    )
    worker.read_line()
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, used))
    worker.write_line()
    assert worker.wait() == -9
    watcher.server.stop()
    assert f"worker {worker.pid} overran 'x'" in capfd.readouterr().err


def test_a_report_folder_that_can_t_be_written(
    start_watcher: StartWatcher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    watcher = start_watcher(report_dir=tmp_path / "file" / "reports")
    worker = watcher.connected_worker(
        "import time, hangwatch\nwith hangwatch.expires(0.3, 'x'): time.sleep(1000)"
    )
    assert worker.wait() == -9, "the kill still happens"
    watcher.server.stop()
    log = capfd.readouterr().err
    assert f"worker {worker.pid} overran 'x'" in log
    assert "time.sleep" in log or "<- holds the scope" in log
    assert "can't be written to" in log


@pytest.mark.parametrize(
    "wait", ["time.sleep(0.4)", "sys.stdin.readline()"], ids=["found", "reported"]
)
def test_a_ring_that_outlasts_the_limit_costs_no_deadline(
    watcher_with: StartWatcher, wait: str
) -> None:
    """The first deadline passes while it rings, and may be found; the later one must be."""
    watcher = watcher_with(on_expiry="report")
    worker = watcher.worker(
        f"""
import sys, time, hangwatch
from hangwatch.worker.client import WorkerClient
ring, slow = WorkerClient.ring, False
def ring_slowly(self):
    global slow
    ring(self)
    if slow:  # as a handshake may be
        slow = False
        {wait}
        print(time.time(), flush=True)
        return True
    return False
WorkerClient.ring = ring_slowly
exec({CONNECT!r})
slow = True
with hangwatch.expires(0.3, "slow"):
    assert not slow
    time.sleep(1000)
""",
        stdin=subprocess.PIPE,
    )

    if "readline" in wait:
        assert watcher.report(pid=worker.pid)["outcome"] == "reported"
        worker.write_line()
    rang_until = float(worker.read_line())

    def is_second(report: dict[str, Any]) -> bool:
        at = datetime.fromisoformat(report["at"]).timestamp()
        return report["outcome"] == "reported" and at > rang_until

    wait_until(lambda: any(map(is_second, watcher.reports(pid=worker.pid))), "the second report")
    worker.kill()


def test_reports_that_wait_for_a_grace_hold_up_no_other(watcher_with: StartWatcher) -> None:
    watcher = watcher_with(grace=1000)
    deaf = """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
with hangwatch.expires(0.3, "deaf"):
    while True: time.sleep(1000)
"""
    gentle = "import time, hangwatch\nwith hangwatch.expires(0.3, 'gentle'): time.sleep(1000)"
    workers = [watcher.connected_worker(deaf) for _ in range(4)]
    assert [worker.read_line() for worker in workers] == ["SIGTERM"] * 4
    last = watcher.connected_worker(gentle)
    assert last.wait() == -signal.SIGTERM
    assert watcher.report(pid=last.pid)["outcome"] == "reaped"
    assert [worker.poll() for worker in workers] == [None] * 4, "they are in their grace still"
    for worker in workers:
        worker.kill()
        assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
