"""`hangwatch serve`, `serve()` and the server: starting, listening, ending."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

import hangwatch
from support.nursery import LIMIT, nursery
from support.processes import comm
from support.raw_worker import answer, hello, memfd
from support.watchers import wait_until, watcher_below

SERVE = [sys.executable, "-m", "hangwatch", "serve"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hw-serve-") as name:
        yield Path(name)


class TestCommand:
    def start(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen([*SERVE, *arguments], stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def refuses(self, *arguments: str, **options: object) -> str:
        process = self.start(*arguments, **options)
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert "Traceback" not in err
        return str(err)

    def test_it_makes_a_private_socket_and_removes_it(self, folder: Path) -> None:
        path = folder / "new" / "sock"
        process = self.start("--address", str(path))
        try:
            wait_until(path.exists, "the socket")
            wait_until(lambda: comm(process.pid) == "hw-keeper", "its name in ps")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert answer(str(path), hello(), [memfd()]) is None
        finally:
            process.terminate()
            _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        assert not path.exists()

    def test_by_default_it_listens_in_the_user_s_runtime_folder(self, folder: Path) -> None:
        process = self.start(env={**os.environ, "XDG_RUNTIME_DIR": str(folder)})
        wait_until((folder / "hangwatch" / "v3-watcher.sock").exists, "the socket")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT)
        assert process.returncode == 0

    def test_a_second_watcher_at_one_address_is_refused_a_dead_one_is_replaced(
        self, folder: Path
    ) -> None:
        path = folder / "sock"
        first = self.start("--address", str(path))
        wait_until(lambda: path.exists() and comm(first.pid) == "hw-keeper", "the first")
        assert "another watcher listens" in self.refuses("--address", str(path))
        pid = watcher_below(first.pid)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # else it would outlive its keeper, and tidy up
        first.kill()
        os.kill(pid, signal.SIGKILL)
        first.communicate()
        assert path.exists()
        second = self.start("--address", str(path))

        def served() -> bool:
            try:
                return answer(str(path), hello(), [memfd()]) is None
            except OSError:
                return False

        wait_until(served, "the second serves")
        second.terminate()
        second.communicate(timeout=LIMIT)

    def test_folders_that_are_not_safe(self, folder: Path) -> None:
        opened = folder / "open"
        opened.mkdir()
        opened.chmod(0o755)
        assert "chmod 700" in self.refuses("--address", str(opened / "s"))
        file = folder / "file"
        file.write_text("")
        assert "is no socket" in self.refuses("--address", str(file))
        assert "is no folder" in self.refuses("--address", str(file / "s"))
        assert "107 bytes" in self.refuses("--address", str(folder / ("x" * 120)))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
    def test_a_folder_of_somebody_else(self, folder: Path) -> None:
        theirs = folder / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, 12345, -1)
        assert "belongs to user 12345" in self.refuses("--address", str(theirs / "s"))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
    def test_another_user_is_refused_on_both_sides(self, folder: Path) -> None:
        path = folder / "sock"
        process = self.start("--address", str(path))
        wait_until(lambda: path.exists() and comm(process.pid) == "hw-keeper", "the watcher")
        folder.chmod(0o755)
        path.chmod(0o666)
        script = """
import os, socket, sys
import hangwatch
from support.raw_worker import answer, hello, memfd
os.seteuid(12345)
print(answer(sys.argv[1], hello(), [memfd()]))
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1] + ".false")
listener.listen()
os.seteuid(0)
try:
    hangwatch.SharedMemoryTimerClient(sys.argv[1] + ".false")
except hangwatch.WatcherUnavailableError as error:
    print(error)
"""
        folder.chmod(0o777)
        said, _ = nursery().fork(script, str(path)).communicate()
        process.terminate()
        process.communicate(timeout=LIMIT)
        assert "this is user 12345" in said
        assert "belongs to user 12345, not to 0" in said

    def test_its_launcher_s_death_ends_it(self, folder: Path) -> None:
        code = (
            "import sys, hangwatch, os, signal\n"
            "s = hangwatch.SharedMemoryTimerServer(sys.argv[1], report_dir=None); s.start()\n"
            "print(s.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        said, _ = nursery().fork(code, str(folder / "s")).communicate()
        pid = int(said)

        def ended() -> bool:
            try:
                return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return True

        wait_until(ended, "the watcher ends with its launcher")
        assert not (folder / "s").exists()


def hang() -> None:
    with hangwatch.expires(0.2, "pool"):
        time.sleep(1000)


def work(number: int) -> int:
    with hangwatch.expires(600, "pool"):
        return number * 2


class TestServe:
    def test_children_and_the_process_itself_are_watched(self, tmp_path: Path) -> None:
        with hangwatch.serve(report_dir=tmp_path) as server:
            assert os.environ["HANGWATCH_ADDRESS"] == server.address
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                with hangwatch.expires(600, "own"):
                    assert pool.submit(work, 21).result() == 42
                with pytest.raises(BrokenProcessPool):
                    pool.submit(hang).result()
        assert "HANGWATCH_ADDRESS" not in os.environ
        (report,) = tmp_path.glob("[!.]*/report.json")
        assert '"pool"' in report.read_text()
        with pytest.raises(hangwatch.NotConfiguredError), hangwatch.expires(1, "own"):
            pass

    def test_one_after_the_other_in_one_process(self, tmp_path: Path) -> None:
        for count in 1, 2:
            with (
                hangwatch.serve(report_dir=tmp_path, on_expiry="report"),
                hangwatch.expires(0.1, "own"),
            ):
                wait_until(
                    lambda: len(list(tmp_path.glob("[!.]*/report.json"))) == count,  # noqa: B023
                    "a report",
                )

    def test_inside_of_each_other(self, tmp_path: Path) -> None:
        with hangwatch.serve(report_dir=tmp_path) as outer:
            with hangwatch.serve(report_dir=tmp_path) as inner:
                assert os.environ["HANGWATCH_ADDRESS"] == inner.address != outer.address
            assert os.environ["HANGWATCH_ADDRESS"] == outer.address

    def test_a_server_may_be_started_and_stopped_in_any_order(self) -> None:
        server = hangwatch.SharedMemoryTimerServer(report_dir=None)
        server.stop()
        server.start()
        first = server.pid
        server.start()
        assert server.pid == first
        server.stop()
        server.stop()
        server.start()
        assert server.pid != first
        server.stop()
        assert server.address is None

    @pytest.mark.parametrize(
        "bad", [{"on_expiry": "kill"}, {"grace": -1.0}, {"grace": float("nan")}]
    )
    def test_bad_settings(self, bad: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(bad))), hangwatch.serve(**bad):  # type: ignore[arg-type]
            pass

    def test_a_watcher_that_can_t_start_says_why(self, folder: Path) -> None:
        (folder / "file").write_text("")
        server = hangwatch.SharedMemoryTimerServer(folder / "file")
        with pytest.raises(hangwatch.LaunchError, match="before it was ready"):
            server.start()


def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hangwatch", "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rank 2" in result.stderr
    assert "stop_in_c" in result.stderr
    assert "NO" not in result.stdout


def test_version() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "hangwatch", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout == f"hangwatch, version {hangwatch.__version__}\n"


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to trace with")
def test_a_kernel_without_pidfds_is_said_at_once(tmp_path: Path) -> None:
    """strace lets the system call fail as an older kernel would."""
    result = subprocess.run(
        [
            *("strace", "-f", "-o", "/dev/null", "-e", "inject=pidfd_open:error=ENOSYS"),
            *(sys.executable, "-m", "hangwatch", "serve", "--address", str(tmp_path / "sock")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "hangwatch needs Linux 5.3 or newer" in result.stderr
    assert not (tmp_path / "sock").exists()
