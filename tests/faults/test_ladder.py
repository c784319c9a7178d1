"""From verdict to death: what is killed, what is spared, and how it is confirmed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.namespaces import run_alone
from support.processes import is_alive
from support.watchers import RunningWatcher, StartWatcher, wait_until


def actions(report: dict[str, Any]) -> list[str]:
    return [action["action"] for action in report["actions"]]


def test_sigkill_at_once_without_a_grace(watcher: RunningWatcher) -> None:
    worker = watcher.worker(
        """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
with hangwatch.expires(0.3, "no grace"): time.sleep(1000)
""",
    )
    out, _ = worker.communicate(timeout=30)
    assert (worker.returncode, out) == (-9, "")
    assert actions(watcher.report(pid=worker.pid)) == ["SIGKILL", "confirm"]


def test_sigterm_and_a_grace_for_who_ends_by_itself(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(grace=20)
    worker = watcher.worker(
        """
import signal, sys, time, hangwatch
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
with hangwatch.expires(0.3, "gentle"): time.sleep(1000)
""",
    )
    assert worker.wait(30) == 3
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "reaped"
    assert actions(report) == ["SIGTERM", "confirm"]
    worker.communicate()


def test_who_leaves_the_block_on_sigterm_and_goes_on_is_left_alone(
    start_watcher: StartWatcher,
) -> None:
    watcher = start_watcher(grace=1)
    worker = watcher.worker(
        """
import signal, sys, time, hangwatch
class Stop(Exception): pass
def stop(*_): raise Stop
signal.signal(signal.SIGTERM, stop)
try:
    with hangwatch.expires(0.3, "brief"): time.sleep(1000)
except Stop: pass
time.sleep(2)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    report = watcher.report(pid=worker.pid)
    assert report["outcome"] == "recovered"
    assert actions(report) == ["SIGTERM", "look"]
    assert "; after SIGTERM: the block has ended, at most" in report["headline"]


def test_sigkill_after_the_grace_for_who_ignores_sigterm(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(grace=0.5)
    worker = watcher.worker(
        """
import signal, time, hangwatch
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with hangwatch.expires(0.3, "deaf"): time.sleep(1000)
""",
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    report = watcher.report(pid=worker.pid)
    assert actions(report) == ["SIGTERM", "SIGKILL", "confirm"]
    assert report["actions"][1]["at_s"] - report["actions"][0]["at_s"] >= 0.5


def test_who_leaves_the_block_during_the_evidence_is_recovered(
    start_watcher: StartWatcher,
) -> None:
    """Blocks that end around their verdict: killed before the end, or not at all."""
    watcher = start_watcher()
    script = """
import sys, time, hangwatch
with hangwatch.expires(0.3, "late"): time.sleep(0.3 + float(sys.argv[1]))
time.sleep(0.3)
"""
    workers = {}
    for late in (0.004, 0.008, 0.015, 0.03, 0.06):
        worker = watcher.worker(script, str(late))
        worker.communicate(timeout=30)
        workers[worker.pid] = worker.returncode
    watcher.server.stop()
    for pid, status in workers.items():
        outcomes = [r["outcome"] for r in watcher.reports() if r["worker"]["pid"] == pid]
        assert outcomes in ([], ["recovered"], ["reaped"])
        assert (status == -9) == (outcomes == ["reaped"])
    found = [report for report in watcher.reports() if report["outcome"] == "recovered"]
    assert found, "at least one of them left in time"
    for report in found:
        assert actions(report) == ["look"]


FAMILY = """
import os, subprocess, sys, time, hangwatch
child = subprocess.Popen([sys.executable, "-c",
    "import subprocess, time; p = subprocess.Popen(['sleep', '1000']);"
    "print(p.pid, flush=True); time.sleep(1000)"], stdout=subprocess.PIPE)
grandchild = int(child.stdout.readline())
print(child.pid, grandchild, flush=True)
with hangwatch.expires(0.5, "family"): time.sleep(1000)
"""


@pytest.mark.parametrize("tree", [True, False])
def test_descendants_are_killed_with_their_worker_unless_told_not_to(
    start_watcher: StartWatcher, tree: bool
) -> None:
    watcher = start_watcher(tree=tree)
    worker = watcher.worker(FAMILY, stderr=subprocess.DEVNULL)
    assert worker.stdout is not None
    family = [int(pid) for pid in worker.stdout.readline().split()]
    assert worker.wait(30) == -9
    report = watcher.report(pid=worker.pid)
    killed = [action for action in report["actions"] if "descendant" in action["action"]]
    try:
        if tree:
            wait_until(lambda: not any(map(is_alive, family)), "the descendants are dead")
            assert len(killed) == 2
            assert all(action["result"].endswith("it is dead") for action in killed)
        else:
            assert all(map(is_alive, family))
            assert killed == []
    finally:
        for pid in family:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        worker.stdout.close()


SPARED = """
import os, tempfile, time
from pathlib import Path
import hangwatch
from support.watchers import RunningWatcher

# A worker whose child is a worker, too, with a child of its own: both are spared.
WORKER = '''
import subprocess, sys, time, hangwatch
CHILD = "import subprocess, time, hangwatch\\\\np = subprocess.Popen(['sleep', '1000'])\\\\n" \\
    "with hangwatch.expires(60, 'child'):\\\\n    print(p.pid, flush=True); time.sleep(1000)"
child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
other = subprocess.Popen(["sleep", "1000"])
print(child.pid, int(child.stdout.readline()), other.pid, flush=True)
with hangwatch.expires(0.5, "parent"): time.sleep(1000)
'''
with tempfile.TemporaryDirectory() as folder:
    with hangwatch.serve(report_dir=folder) as server:
        # The watcher itself descends from this process, which is a worker as well.
        watcher = RunningWatcher(server, Path(folder))
        worker = watcher.worker(WORKER)
        child, grandchild, other = map(int, worker.stdout.readline().split())
        assert worker.wait(20) == -9
        report = watcher.report(pid=worker.pid)
        alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and \\
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        assert alive(child), "a watched worker was killed with its parent"
        assert alive(grandchild), "a watched worker's child was killed"
        assert not alive(other)
        killed = [a["action"] for a in report["actions"] if "descendant" in a["action"]]
        assert killed == [f"SIGKILL to descendant {other}"], killed
        os.kill(child, 9); os.kill(grandchild, 9)
        worker.stdout.close()
print("held")
"""


def test_watched_descendants_are_spared() -> None:
    assert "held" in run_alone(SPARED)


ROOT_HANGS = """
import os, subprocess, sys, tempfile, time
from pathlib import Path
from support.watchers import wait_until
import json

folder = tempfile.mkdtemp()
PROGRAM = '''
import sys, time, hangwatch
with hangwatch.serve(report_dir=sys.argv[1]) as server:
    with hangwatch.expires(0.5, "the launcher"): time.sleep(1000)
'''
root = subprocess.Popen([sys.executable, "-c", PROGRAM, folder])
def watchers():
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [stat for stat in stats if "(hw-watcher) " in stat and "(hw-watcher) Z" not in stat]
wait_until(watchers, "the watcher shows under its name")
assert root.wait(20) == -9
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
from hangwatch import page
descriptor = memfd()
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor, fenced=False)], [descriptor])
    connection.recv(100)
    memory = mmap.mmap(descriptor, page.PAGE_BYTES)
    words = memoryview(memory).cast("d")
    words[page.SLOTS_IN_USE] = 1.0
    words[page.deadline_word(0) + page.ENTRY] = 1.0
    words[page.deadline_word(0)] = time.monotonic() + 0.2
    time.sleep(1000)  # never rings
"""


def test_a_worker_that_the_fence_does_not_reach_is_swept(watcher: RunningWatcher) -> None:
    worker = watcher.worker(UNFENCED, watcher.address, *filter(None, sys.path))
    worker.communicate(timeout=30)
    assert worker.returncode == -9
    assert watcher.report(pid=worker.pid)["scope"]["late_s"] < 5


MOVED = """
import mmap, os, socket, sys, time
sys.path[:0] = sys.argv[2:]
from support.raw_worker import connect, hello, memfd
from hangwatch import page
descriptor = memfd()
with connect(sys.argv[1]) as connection:
    socket.send_fds(connection, [hello(page_fd=descriptor)], [descriptor])
    connection.recv(100)
    words = memoryview(mmap.mmap(descriptor, page.PAGE_BYTES)).cast("d")
    words[page.SLOTS_IN_USE] = 1.0
    words[page.deadline_word(0) + page.LIMIT] = 0.2
    words[page.deadline_word(0) + page.ENTRY] = 1.0
    for _ in range(2):
        words[page.deadline_word(0)] = time.monotonic() + 0.2
        connection.send(b"!")
        sys.stdin.readline()
"""


def test_a_block_whose_deadline_has_moved_is_judged_anew(start_watcher: StartWatcher) -> None:
    """As one does whose first ring took longer than its limit; the entry is the same."""
    watcher = start_watcher(on_expiry="report")
    worker = watcher.worker(MOVED, watcher.address, *filter(None, sys.path), stdin=subprocess.PIPE)
    assert worker.stdin is not None
    for count in (1, 2):
        wait_until(lambda count=count: len(watcher.reports()) == count, f"report {count}")  # type: ignore[misc]
        time.sleep(0.3)  # the incident is over
        worker.stdin.write("go on\n")
        worker.stdin.flush()
    worker.communicate(timeout=30)
    assert len(watcher.reports()) == 2


def test_many_hangs_at_once_are_all_ended(start_watcher: StartWatcher) -> None:
    watcher = start_watcher()
    script = "import time, hangwatch\nwith hangwatch.expires(1.5, 'many'): time.sleep(1000)"
    workers = [watcher.worker(script) for _ in range(12)]
    for worker in workers:
        worker.communicate(timeout=40)
        assert worker.returncode == -9
    wait_until(lambda: len(watcher.reports()) == 12, "twelve reports")
    assert {report["outcome"] for report in watcher.reports()} == {"reaped"}


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
        self, start_watcher: StartWatcher, freezer: Path
    ) -> None:
        watcher = start_watcher()
        worker = watcher.worker(
            "import time, hangwatch\n"
            "with hangwatch.expires(2, 'frozen'):\n    print('in', flush=True); time.sleep(1000)",
        )
        assert worker.stdout is not None
        worker.stdout.readline()
        (freezer / "tasks").write_text(str(worker.pid))
        (freezer / "freezer.state").write_text("FROZEN")
        report = watcher.report(pid=worker.pid)
        assert report["outcome"] == "unkillable"
        assert report["process"]["state"] in ("D", "S")
        assert report["missing"], "and why there are no stacks"
        time.sleep(0.5)
        (freezer / "freezer.state").write_text("THAWED")
        assert worker.wait(30) == -9
        worker.stdout.close()
        assert len(watcher.reports()) == 1


def test_a_watcher_with_no_descriptor_left_still_kills(
    start_watcher: StartWatcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher = start_watcher()
    pid = watcher.pid
    worker = watcher.worker(
        "import time, hangwatch\n"
        "with hangwatch.expires(1.5, 'x'):\n    print('in', flush=True); time.sleep(1000)",
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, used))
    assert worker.wait(30) == -9
    worker.stdout.close()
    watcher.server.stop()
    assert f"worker {worker.pid} overran 'x'" in capfd.readouterr().err


def test_a_report_folder_that_can_t_be_written(
    start_watcher: StartWatcher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    watcher = start_watcher(report_dir=tmp_path / "file" / "reports")
    worker = watcher.worker(
        "import time, hangwatch\nwith hangwatch.expires(0.3, 'x'): time.sleep(1000)"
    )
    worker.communicate(timeout=30)
    assert worker.returncode == -9, "the kill still happens"
    watcher.server.stop()
    log = capfd.readouterr().err
    assert f"worker {worker.pid} overran 'x'" in log
    assert "time.sleep" in log or "<- holds the scope" in log
    assert "can't be written to" in log


@pytest.mark.parametrize(
    ("ringing_takes", "reported"), [(0.4, 1), (3.0, 2)], ids=["found", "reported"]
)
def test_a_ring_that_outlasts_the_limit_costs_no_deadline(
    start_watcher: StartWatcher, ringing_takes: float, reported: int
) -> None:
    """The first deadline passes while it rings, and may be found; the later one must be."""
    watcher = start_watcher(on_expiry="report")
    worker = watcher.worker(
        f"""
import time, hangwatch
from hangwatch.worker.client import WorkerClient
ring, slow = WorkerClient.ring, False
def ring_slowly(self):
    global slow
    ring(self)
    if slow:  # as if another thread had the GIL meanwhile
        slow = False
        time.sleep({ringing_takes})
WorkerClient.ring = ring_slowly
with hangwatch.expires(1000, "connect"): pass
slow = True
with hangwatch.expires(0.3, "slow"): time.sleep(1000)
""",
    )
    wait_until(
        lambda: [r["outcome"] for r in watcher.reports()].count("reported") == reported,
        "a report of each deadline that stayed",
    )
    worker.kill()
    worker.communicate()


def test_reports_that_wait_for_a_grace_hold_up_no_other(start_watcher: StartWatcher) -> None:
    watcher = start_watcher(grace=14)
    deaf = (
        "import signal, time, hangwatch\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with hangwatch.expires(0.3, 'deaf'): time.sleep(1000)"
    )
    gentle = "import time, hangwatch\nwith hangwatch.expires(2, 'gentle'): time.sleep(1000)"
    workers = [watcher.worker(deaf) for _ in range(4)]
    last = watcher.worker(gentle)
    assert last.wait(30) == -signal.SIGTERM
    assert watcher.report(pid=last.pid)["outcome"] == "reaped"
    assert [worker.poll() for worker in workers] == [None] * 4, "they are in their grace still"
    for worker in (*workers, last):
        worker.kill()
        worker.communicate()
