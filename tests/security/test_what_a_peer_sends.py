"""What a peer sends is neither run, nor unpickled, nor opened, nor is its environment told."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import hangwatch
from hangwatch import failpoints
from hangwatch.worker.hello import labels_from
from support.nursery import LIMIT, nursery
from support.processes import open_files
from support.raw_worker import answer, connect, hello, memfd
from support.watchers import CONNECT, RunningWatcher, StartWatcher, wait_until

SOURCE = Path(hangwatch.__file__).parent
# Bytes that a helper of the watcher, a fork of it, has sent to it.
MAY_PICKLE = {"watcher/error_file.py", "watcher/incident.py", "watcher/reporter.py"}
# A multiprocessing queue unpickles by itself, as PyTorch's does.
DROP_IN = {"timer/local_timer.py"}
UNPICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCE.rglob("*.py"):
        yield str(path.relative_to(SOURCE)), ast.parse(path.read_text())


def imports_of(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_forks_of_the_watcher_send_it_pickles() -> None:
    found = {
        name
        for name, tree in modules()
        if any(imported.split(".")[0] in UNPICKLES for imported in imports_of(tree))
    }
    assert found == MAY_PICKLE


def test_nothing_but_the_drop_in_reads_a_queue() -> None:
    found = {
        name
        for name, tree in modules()
        if any(imported.split(".")[0] == "multiprocessing" for imported in imports_of(tree))
    }
    assert found <= DROP_IN


def test_there_is_no_shell_and_no_eval() -> None:
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"os.system", "os.popen", "eval", "exec", "compile"}, name
                assert not called.startswith(("subprocess.getoutput", "commands.")), name
                assert all(keyword.arg != "shell" for keyword in node.keywords), name
                assert "create_subprocess_shell" not in called, name


class Bomb:
    """Leaves a file wherever it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_no_hello_and_no_ring(watcher: RunningWatcher, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "gone off"), protocol=0)
    page = memfd()
    try:
        assert "not one of a hangwatch worker" in str(answer(watcher.address, bomb, [page]))
        with connect(watcher.address) as connection:
            socket.send_fds(connection, [hello(labels={"rank": bomb.decode()})], [page])
            connection.recv(4096)
            for _ in range(3):
                connection.send(bomb)
        assert answer(watcher.address, hello(), [page]) is None
    finally:
        os.close(page)
    assert not (tmp_path / "gone off").exists()
    pickle.loads(bomb)
    assert (tmp_path / "gone off").exists(), "it would have"


def test_a_pickle_in_the_place_of_stacks_is_text(watcher: RunningWatcher, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "gone off"), protocol=0)
    worker = watcher.connected_worker(
        """
import os, signal, sys, time, hangwatch
from hangwatch.worker import stack_channel
bomb = bytes.fromhex(sys.argv[1])
with hangwatch.expires(60): pass
for number in stack_channel._Channel.signals:
    signal.signal(number, lambda *_: os.write(stack_channel._Channel.descriptor.number, bomb))
with hangwatch.expires(0.3, bomb.decode()): time.sleep(1000)
""",
        bomb.hex(),
    )
    worker.communicate()
    assert worker.returncode == -9
    assert watcher.report(pid=worker.pid)["outcome"] == "reaped"
    assert not (tmp_path / "gone off").exists()


HANGS_WITH_PATHS = """
import os, sys, threading, time, hangwatch
place = sys.argv[1]
threading.current_thread().name = f"{place}/thread"
with hangwatch.expires(0.3, f"{place}/scope"): time.sleep(1000)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to trace with")
def test_no_path_of_a_peer_is_opened_but_the_error_file(tmp_path: Path) -> None:
    """Every system call that takes a path, of keeper, watcher and helpers, from hello to end."""
    place = tmp_path / "of-the-peer"
    place.mkdir()
    names = ["argument", "rank", "run", "thread", "scope", "program"]
    for name in names:
        (place / name).write_text("")
    trace, reports = tmp_path / "trace", tmp_path / "reports"
    with tempfile.TemporaryDirectory(prefix="hw-test-") as folder:
        address = f"{folder}/sock"
        traced = subprocess.Popen(
            [
                *("strace", "-f", "--seccomp-bpf", "-s", "4096", "-e", "trace=%file"),
                *("-o", str(trace), sys.executable, "-m", "hangwatch", "serve"),
                *("--address", address, "--report-dir", str(reports)),
            ],
            stderr=subprocess.DEVNULL,
        )

        def served() -> bool:
            with contextlib.suppress(OSError):
                return answer(address, hello(), [page]) is None
            return False

        try:
            page = memfd()
            wait_until(served, "the watcher")
            os.close(page)
            environment = {
                **os.environ,
                "HANGWATCH_ADDRESS": address,
                "TORCHELASTIC_ERROR_FILE": str(place / "error.json"),
                "TORCHELASTIC_RUN_ID": str(place / "run"),
                "RANK": str(place / "rank"),
            }
            worker = nursery().fork(CONNECT + HANGS_WITH_PATHS, str(place), env=environment)
            assert worker.wait() == -9
            worker.close()
            wait_until(lambda: list(reports.glob("[!.]*/report.json")), "the report")
        finally:
            keeper = Path(f"/proc/{traced.pid}/task/{traced.pid}/children").read_text().split()
            for pid in keeper:
                os.kill(int(pid), 15)
            traced.wait()
    text = trace.read_text()
    (report,) = reports.glob("*/report.json")
    for name in ("rank", "run", "scope"):
        assert f"{place}/{name}" in report.read_text(), "the watcher has heard of it"
    lines = [line for line in text.splitlines() if f'"{place}' in line]
    assert lines, "the error file at least"
    taken = {re.sub(r"^\d+ +(\w+)\(.*$", r"\1", line) for line in lines if "resumed" not in line}
    assert taken == {"openat"}, lines
    assert all(f'"{place}/error.json"' in line for line in lines), lines
    assert "execve" not in text.split("\n", 1)[1], "and nothing was run"


SECRET = "correct-horse-battery-staple"
HANGS = (
    CONNECT
    + """
import time, hangwatch
with hangwatch.expires(0.3, "with a secret"): time.sleep(1000)
"""
)


def test_no_environment_is_told(tmp_path: Path) -> None:
    """Neither the worker's nor the watcher's own, in no report, log or event."""
    reports, events = tmp_path / "reports", tmp_path / "events"
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hangwatch", "run"),
            *("--report-dir", str(reports), "--events", str(events)),
            *("--", sys.executable, "-c", HANGS),
        ],
        env={**environment, "RANK": "7", "API_TOKEN": SECRET, "RANK_TOKEN": SECRET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 128 + 9
    (report,) = reports.glob("*/report.json")
    assert json.loads(report.read_text())["worker"]["labels"] == {"rank": "7"}
    told = {str(path): path.read_text() for path in [*reports.glob("*/*"), events]}
    told |= {"out": result.stdout, "log": result.stderr}
    assert len(told) == 5
    for name, text in told.items():
        assert "with a secret" in text or name == "out", "it is told about"
        assert SECRET not in text, name
        assert "API_TOKEN" not in text, name


def test_labels_come_from_a_list() -> None:
    environment = {name: name for name in [*os.environ, "API_TOKEN", "PATH", "RANK", "LOCAL_RANK"]}
    environment |= {"WORLD_SIZE": "8", "SLURM_JOB_ID": "5", "HOME": "/"}
    assert labels_from(environment).keys() <= {
        "rank",
        "local_rank",
        "group_rank",
        "world_size",
        "run_id",
        "restart_count",
    }


SENDS_WHAT_TAKES_LONG_TO_CLOSE = """
import contextlib, os, socket, struct, sys
from support.raw_worker import connect, hello, memfd
sink = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
sink.setblocking(False)
with contextlib.suppress(BlockingIOError):
    while True: sink.send(bytes(65536))
sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
with connect(sys.argv[1]) as worker:
    socket.send_fds(worker, [hello()], [memfd()])
    worker.recv(4096)
    print("in", flush=True)
    sys.stdin.readline()
    for _ in range(64): worker.send(b"!")
    try: socket.send_fds(worker, [b"!"], [sink.fileno()])
    except PermissionError: print("refused")
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("kernel", ["this", "before Linux 6.16"])
def test_descriptors_that_take_long_to_close_hold_up_no_keeper(
    start_watcher: StartWatcher, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """They stand unread in the socket of who has ended; the last to close it closes them."""
    with monkeypatch.context() as patch:
        if kernel != "this":
            patch.setenv(failpoints.VARIABLE, "kernel.pass-rights=fail:ENOPROTOOPT")
        watcher = start_watcher()
    before = open_files(watcher.keeper_pid)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        listener.settimeout(LIMIT)
        worker = watcher.worker(
            SENDS_WHAT_TAKES_LONG_TO_CLOSE,
            *(watcher.address, str(listener.getsockname()[1])),
            stdin=subprocess.PIPE,
            env=watcher.environment(PYTHONPATH=str(Path(__file__).parents[1])),
        )
        stack.enter_context(listener.accept()[0])
        assert worker.read_line() == "in"
        os.kill(watcher.pid, signal.SIGSTOP)
        out, _ = worker.communicate("go on\n")
        os.kill(watcher.pid, signal.SIGCONT)
        assert out in ("", "refused\n") if kernel == "this" else out == ""
        wait_until(lambda: open_files(watcher.keeper_pid) <= before, "the keeper lets go of it")
        page = memfd()
        stack.callback(os.close, page)
        answers: list[str | None] = []

        def is_welcome() -> bool:
            with contextlib.suppress(OSError):  # a watcher that is being replaced
                answers.append(answer(watcher.address, hello(), [page]))
                return answers[-1] is None
            return False

        # The keeper has to answer before anybody is welcome.
        for _ in range(2):
            wait_until(is_welcome, "a newcomer is served")
    assert set(answers) == {None}
