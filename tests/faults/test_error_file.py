"""The file in which torchrun looks for the reason of a rank's end: there before the rank dies."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hangwatch.evidence import error_file
from hangwatch.evidence.model import Case, Scope, ScopeThread
from hangwatch.evidence.model import Worker as WorkerModel
from hangwatch.process import Identity
from hangwatch.watcher.error_file import ErrorFile
from hangwatch.watcher.fair_clock import FairClock
from hangwatch.watcher.helper import Helper
from support.nursery import Worker, nursery
from support.processes import is_alive
from support.watchers import (
    CONNECT,
    RunningWatcher,
    StartWatcher,
    first_recovered,
    wait_until,
)

HANGS = """
import threading, time, hangwatch
def stuck_here(): time.sleep(1000)
threading.Thread(target=time.sleep, args=(1000,), name="bystander", daemon=True).start()
with hangwatch.expires(0.3, "hangs"): stuck_here()
"""


def start(watcher: RunningWatcher, script: str, path: Path | str, **options: Any) -> Worker:
    environment = watcher.environment(TORCHELASTIC_ERROR_FILE=str(path), RANK="3")
    return watcher.connected_worker(script, env=environment, **options)


def hang(watcher: RunningWatcher, path: Path) -> str:
    """Have a worker hang and be killed; return what its report says of the file."""
    worker = start(watcher, HANGS, path)
    assert worker.wait() == -9
    (said,) = said_of_the_file(watcher.report(pid=worker.pid))
    return said


def said_of_the_file(report: dict[str, Any]) -> list[str]:
    return [action["result"] for action in report["actions"] if action["action"] == "error file"]


def test_it_is_complete_when_the_worker_is_dead(watcher: RunningWatcher, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    began = int(time.time())
    worker = start(watcher, HANGS, path)
    assert worker.wait() == -9
    content = json.loads(path.read_bytes())

    assert set(content) == {"message"}
    assert set(content["message"]) == {"message", "extraInfo"}
    assert set(content["message"]["extraInfo"]) == {"py_callstack", "timestamp"}
    headline = f"rank 3 (pid {worker.pid}) overran 'hangs'"
    assert content["message"]["message"].startswith(headline)
    stack = content["message"]["extraInfo"]["py_callstack"]
    assert headline in stack.splitlines()[0]
    assert "in stuck_here\n" in stack
    report = watcher.report(pid=worker.pid)
    # A machine that stands still may leave no time for theirs; the report says so then.
    late = any(reason.startswith("the other threads") for reason in report["missing"])
    assert "the other threads" in stack or late
    assert began <= int(content["message"]["extraInfo"]["timestamp"]) <= time.time()
    assert path.stat().st_mode & 0o777 == 0o600

    assert [action["action"] for action in report["actions"]] == [
        "error file",
        "SIGKILL",
        "confirm",
    ]
    assert said_of_the_file(report) == ["written"]


def test_it_is_there_before_the_first_signal(watcher_with: StartWatcher, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    script = f"""
import json, signal, sys, time, hangwatch
def ended(*_):
    print(json.load(open({str(path)!r}))["message"]["message"], flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, ended)
with hangwatch.expires(0.3, "gentle"): time.sleep(1000)
"""
    worker = start(watcher_with(grace=1000), script, path)
    out, _ = worker.communicate()
    assert worker.returncode == 3
    assert "overran 'gentle'" in out


@pytest.mark.parametrize("own_words", ["", '{"message": "mine"}'])
def test_a_worker_that_leaves_the_block_keeps_no_file_but_its_own(
    watcher: RunningWatcher, tmp_path: Path, own_words: str
) -> None:
    path = tmp_path / "error.json"
    script = f"""
import os, signal, sys, time, hangwatch
class Stop(Exception): pass
def stop(*_):
    print(os.path.getsize({str(path)!r}), flush=True)
    if {own_words!r}: open({str(path)!r}, "w").write({own_words!r})
    raise Stop
signal.signal(signal.SIGTERM, stop)
try:
    with hangwatch.expires(0.3, "brief", grace=1): time.sleep(1000)
except Stop: pass
sys.stdin.read()
"""

    def start_anew() -> Worker:
        path.unlink(missing_ok=True)
        return start(watcher, script, path, stdin=subprocess.PIPE)

    worker, report = first_recovered(watcher, start_anew)
    if own_words:
        assert path.read_text() == own_words
    else:
        assert not path.exists()
    out, _ = worker.communicate()
    assert worker.returncode == 0
    assert int(out) > 0, "it was there"
    first, second = said_of_the_file(report)
    assert first == "written"
    assert second.startswith("left alone" if own_words else "removed")


def test_a_relative_path_is_meant_from_where_the_worker_armed(
    watcher: RunningWatcher, tmp_path: Path
) -> None:
    assert start(watcher, HANGS, "error.json", cwd=tmp_path).wait() == -9
    assert "stuck_here" in (tmp_path / "error.json").read_text()


def test_a_worker_that_is_only_reported_gets_none(watcher: RunningWatcher, tmp_path: Path) -> None:
    script = """
import sys, hangwatch
with hangwatch.expires(0.3, "slow", on_expiry="report"): sys.stdin.readline()
"""
    worker = start(watcher, script, tmp_path / "error.json", stdin=subprocess.PIPE)
    assert watcher.report(pid=worker.pid)["outcome"] == "reported"
    assert list(tmp_path.iterdir()) == []
    worker.communicate("end\n")
    assert worker.returncode == 0


def test_what_the_worker_wrote_is_left_alone(watcher: RunningWatcher, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text('{"message": "mine"}')
    assert hang(watcher, path).startswith("left alone")
    assert path.read_text() == '{"message": "mine"}'


def test_an_empty_file_is_filled(watcher: RunningWatcher, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    path.write_text("")
    assert hang(watcher, path) == error_file.FILLED
    assert "stuck_here" in path.read_text()


def test_no_symbolic_link_is_followed(watcher: RunningWatcher, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    for target in (tmp_path / "empty", tmp_path / "missing"):
        (tmp_path / "empty").write_text("")
        path.symlink_to(target)
        assert "failed: " in hang(watcher, path)
        assert (tmp_path / "empty").read_text() == ""
        assert not (tmp_path / "missing").exists()
        path.unlink()


@pytest.mark.parametrize("read", [True, False])
def test_a_fifo_is_refused_and_holds_nobody_up(
    watcher: RunningWatcher, tmp_path: Path, read: bool
) -> None:
    path = tmp_path / "error.json"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if read else None
    try:
        said = hang(watcher, path)
        if reader is not None:
            assert said == "not written: it is not a regular file"
            assert os.read(reader, 1) == b"", "nothing was written"
        else:
            assert said == f"failed: {os.strerror(errno.ENXIO)}"
    finally:
        if reader is not None:
            os.close(reader)


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/nothing", "/nowhere/at/all/error.json"])
def test_what_is_no_file_or_in_no_folder_does_no_harm(watcher: RunningWatcher, path: str) -> None:
    assert hang(watcher, Path(path)).startswith(("failed: ", "not written: "))
    assert not Path(path).is_file()


def test_an_empty_path_is_none(watcher: RunningWatcher) -> None:
    worker = start(watcher, HANGS, "")
    assert worker.wait() == -9
    assert said_of_the_file(watcher.report(pid=worker.pid)) == []


def test_a_successor_knows_the_path(start_watcher: StartWatcher, tmp_path: Path) -> None:
    watcher = start_watcher()
    path = tmp_path / "error.json"
    script = """
import sys, time, hangwatch
with hangwatch.expires(1000, "long") as timer:
    print("in", flush=True); sys.stdin.readline()
    timer.renew(0.3); time.sleep(1000)
"""
    worker = start(watcher, script, path, stdin=subprocess.PIPE)
    assert worker.read_line() == "in"
    first = watcher.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_alive(first), "the watcher's death")
    worker.write_line()
    assert worker.wait() == -9
    assert "overran 'long'" in path.read_text()


OTHER_USER_S_WATCHER = """
import sys
from hangwatch.keep.serve import serve
from hangwatch.watcher.settings import Settings
serve(sys.argv[1], Settings(report_dir=sys.argv[2], allowed_uids=frozenset({65534})))
"""
OTHER_USER_S_WORKER = f"""
import ctypes, faulthandler, json, mmap, os, time
import hangwatch
from hangwatch import linux, wire
from hangwatch.worker import client, connection, debugger_notice, stack_channel
os.setgroups([12345])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
exec({CONNECT!r})
with hangwatch.expires(0.3, "another user"): time.sleep(1000)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others can get into, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="hw-test-") as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_it_is_written_with_the_rights_of_the_worker_s_user_only(open_folder: Path) -> None:
    place = open_folder / "watcher"
    place.mkdir(mode=0o711)
    reports = open_folder / "reports"
    folders = {
        "root_s": (0, 0, 0o700),
        "their_own": (65534, 0, 0o700),
        "group_s": (0, 12345, 0o770),
    }
    command = [sys.executable, "-c", OTHER_USER_S_WATCHER, str(place / "sock"), str(reports)]
    with subprocess.Popen(command) as keeper:
        try:
            wait_until((place / "sock").exists, "the watcher")
            said = {}
            for name, (uid, gid, mode) in folders.items():
                folder = open_folder / name
                folder.mkdir()
                folder.chmod(mode)
                os.chown(folder, uid, gid)
                environment = {
                    **os.environ,
                    "HANGWATCH_ADDRESS": str(place / "sock"),
                    "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
                }
                worker = nursery().fork(OTHER_USER_S_WORKER, env=environment)
                assert worker.wait() == -9
                watcher_s = RunningWatcher(None, reports)  # type: ignore[arg-type]
                (said[name],) = said_of_the_file(watcher_s.report(pid=worker.pid))
        finally:
            keeper.terminate()
    assert said == {
        "root_s": "failed: Permission denied",
        "their_own": "written",
        "group_s": "written",
    }
    assert not (open_folder / "root_s" / "error.json").exists()
    for name in ("their_own", "group_s"):
        status = (open_folder / name / "error.json").stat()
        assert (status.st_uid, status.st_gid) == (65534, 65534)


class TestAlone:
    """The course by itself, without a watcher."""

    helpers: ClassVar[list[Helper]] = []

    @classmethod
    def of(cls, pid: int, path: Path) -> ErrorFile:
        def start(work: Callable[[], bytes], keep: list[int], outlives: bool = False) -> Helper:
            cls.helpers.append(Helper(work, keep, outlives))
            return cls.helpers[-1]

        scope = Scope("lost", 1.0, 2.0, 1.0, 1, ScopeThread(1, pid, "MainThread"), [])
        case = Case(time.time(), WorkerModel(pid, 0, 0.0, {}, ["victim"], "3"), scope)
        identity = Identity(pid, os.geteuid(), 0, os.pidfd_open(pid))
        missing = ["evidence: there is none"]
        return ErrorFile(start, FairClock(), identity, str(path), case, None, missing)

    @classmethod
    def run(
        cls, course: Generator[float, None, str], first: Callable[[], object] = lambda: True
    ) -> str:
        """Run it to its end; it is resumed when it wants to be, but not before `first()`."""
        said: list[str] = []

        def steps() -> Generator[float, None, None]:
            said.append((yield from course))

        for until in steps():
            while time.monotonic() < until and not cls.helpers[-1].done:
                time.sleep(0.005)
                cls.helpers[-1].read()
            wait_until(first, "what it does first")
        return said[0]

    def test_a_file_system_that_does_not_answer_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(error_file, "write", lambda path, content: time.sleep(1000))
        file = self.of(os.getpid(), tmp_path / "error.json")
        assert self.run(file.write()) == "failed: not done within 1 s"

    def test_what_came_too_late_is_taken_back_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = error_file.write

        def write_and_hang(path: str, content: bytes) -> str:
            write(path, content)
            time.sleep(1000)
            return ""

        monkeypatch.setattr(error_file, "write", write_and_hang)
        path = tmp_path / "error.json"
        file = self.of(os.getpid(), path)
        said = self.run(file.write(), lambda: path.exists() and path.stat().st_size > 0)
        assert said == "failed: not done within 1 s"
        assert self.run(file.take_back()).startswith("removed")
        assert not path.exists()

    def test_an_empty_file_is_empty_again_when_it_is_taken_back(self, tmp_path: Path) -> None:
        path = tmp_path / "error.json"
        path.write_text("")
        file = self.of(os.getpid(), path)
        assert self.run(file.write()) == error_file.FILLED
        assert self.run(file.take_back()).startswith("removed")
        assert path.read_text() == ""

    def test_without_evidence_it_says_why(self, tmp_path: Path) -> None:
        path = tmp_path / "error.json"
        assert self.run(self.of(os.getpid(), path).write()) == error_file.CREATED
        message = json.loads(path.read_bytes())["message"]
        headline, why = message["extraInfo"]["py_callstack"].splitlines()
        assert headline == f"hangwatch: {message['message']}"
        assert why == "missing: evidence: there is none"

    def test_nobody_writes_for_a_process_that_became_another_user_s(self, tmp_path: Path) -> None:
        identity = Identity(os.getpid(), os.geteuid() + 1, 0, os.pidfd_open(os.getpid()))
        try:
            with pytest.raises(PermissionError, match="another user"):
                error_file.take_rights_of(identity)
        finally:
            os.close(identity.pidfd)

    def test_a_full_disk_leaves_no_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "error.json"
        script = """
import resource, signal, sys
from hangwatch.evidence import error_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
print(error_file.write(sys.argv[1], b"x" * 100))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 10))
print(error_file.write(sys.argv[1], b"x" * 100))
"""
        out, _ = nursery().fork(script, str(path)).communicate()
        assert out.count("not written: ") == 2
        assert not path.exists()
