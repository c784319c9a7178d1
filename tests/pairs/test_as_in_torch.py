"""`import hangwatch.timer as timer`: what PyTorch's pages show, and what its users' tests do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hangwatch.timer as timer
from support.nursery import LIMIT
from support.pairs import CONTEXT, KILLED, exit_status

# As the docstring of torch.distributed.elastic.timer has it; processes in the agent's place.
DOCUMENTED = """
import multiprocessing as mp
import sys
import time
import hangwatch.timer as timer

def trainer_func(message_queue, after, work):
    timer.configure(timer.LocalTimerClient(message_queue))
    with timer.expires(after=after):
        time.sleep(work)

def main():
    start_method = "spawn"
    message_queue = mp.get_context(start_method).Queue()
    server = timer.LocalTimerServer(message_queue, max_interval=0.01)
    server.start()  # non-blocking
    for after, work in (600, 0), (0.5, 1000):
        worker = mp.get_context(start_method).Process(
            target=trainer_func, args=(message_queue, after, work)
        )
        worker.start()
        worker.join()
        print(worker.exitcode, flush=True)
    server.stop()

if __name__ == "__main__":
    main()
"""


def test_the_documented_use_of_the_original(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(DOCUMENTED)
    result = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert (result.returncode, result.stdout) == (0, f"0\n{KILLED}\n"), result.stderr


def test_clear_timers_takes_the_original_s_keywords(tmp_path: Path) -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    in_file = timer.FileTimerServer(str(tmp_path / "fifo"), report_dir=None)
    in_queue = timer.LocalTimerServer(CONTEXT.Queue(), report_dir=None)
    try:
        later = time.time() + 600
        in_file.register_timers([timer.FileTimerRequest(child.pid, "a", later, signal.SIGKILL)])
        in_queue.register_timers([timer.TimerRequest(child.pid, "a", later)])
        assert list(in_file._timers) == list(in_queue._timers) == [(child.pid, "a")]
        in_file.clear_timers(worker_pids={child.pid})
        in_queue.clear_timers(worker_ids={child.pid})
        assert in_file._timers == in_queue._timers == {}
    finally:
        child.communicate()
        in_file.stop()
        in_file._targets.close()
        in_queue._targets.close()


def _overrun(path: str) -> None:
    timer.configure(timer.FileTimerClient(path))
    with timer.expires(after=0.2, scope="patched"):
        time.sleep(1000)


def test_a_patched_reap_worker_is_called_for_every_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def reap(server: timer.FileTimerServer, worker_pid: int, signal: int) -> bool:
        calls.append((worker_pid, signal, os.getpid()))
        os.kill(worker_pid, signal)
        return True

    monkeypatch.setattr(timer.FileTimerServer, "_reap_worker", reap)
    path = str(tmp_path / "fifo")
    server = timer.FileTimerServer(path, "run", 0.05, report_dir=None)
    server.start()
    try:
        worker = CONTEXT.Process(target=_overrun, args=(path,))
        worker.start()
        assert exit_status(worker) == KILLED
    finally:
        server.stop()
    assert calls == [(worker.pid, signal.SIGKILL, os.getpid())]
