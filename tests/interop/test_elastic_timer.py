"""The drop-in pairs against PyTorch's own, and our server in torchrun's agent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.jobs import finish, only_report, torchrun
from support.nursery import LIMIT
from support.processes import is_alive
from support.watchers import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

# -- one side ours, the other PyTorch's: who leaves in time is not ended later

SERVER = """
import sys
from {module} import FileTimerServer
server = FileTimerServer(sys.argv[1], "run", max_interval=0.1)
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""
WORKER = """
import sys, time
import {module} as timer
timer.configure(timer.FileTimerClient(sys.argv[1]))
for _ in range(3):
    with timer.expires(after=20, scope="short"): pass
time.sleep(21)
print("in", flush=True)
with timer.expires(after=1, scope="long"): time.sleep(1000)
"""
LAUNCHER = """
import subprocess, sys
import hangwatch
server = hangwatch.FileTimerServer(sys.argv[1], report_dir=None, max_interval=0.1)
server.start()
worker = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE)
out, _ = worker.communicate(timeout=120)
print(out.decode(), worker.returncode)
server.stop()
"""
QUEUE = """
import multiprocessing, time
import hangwatch, torch.distributed.elastic.timer as timer

def work(queue):
    timer.configure(timer.LocalTimerClient(queue))
    for _ in range(3):
        with timer.expires(after=20, scope="short"): pass
    time.sleep(21)
    print("in", flush=True)
    with timer.expires(after=1, scope="long"): time.sleep(1000)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    server = hangwatch.LocalTimerServer(queue, report_dir=None, max_interval=0.1)
    server.start()
    worker = context.Process(target=work, args=(queue,))
    worker.start()
    worker.join(120)
    print(worker.exitcode)
    server.stop()
"""
TORCH_S = "torch.distributed.elastic.timer"


def test_our_file_client_with_pytorch_s_server(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(module=TORCH_S), fifo],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        script = WORKER.format(module="hangwatch")
        worker = subprocess.run(
            [sys.executable, "-c", script, fifo], capture_output=True, text=True, check=False
        )
        # PyTorch's server ends itself after it has ended a worker.
        assert server.wait(LIMIT) == -9
    assert (worker.returncode, worker.stdout) == (-9, "in\n"), worker.stderr


def test_pytorch_s_file_client_with_our_server(tmp_path: Path) -> None:
    script = WORKER.format(module=TORCH_S)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "fifo"), script]
    stdout, _ = finish(command, tmp_path)
    assert stdout == "in\n -9\n"


def test_pytorch_s_queue_client_with_our_server(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(QUEUE)
    stdout, _ = finish([sys.executable, str(program)], tmp_path)
    assert stdout == "in\n-9\n"


# -- in torchrun's agent

RANK = """
import os, sys, time
import {module} as timer

def stuck_for_good():
    time.sleep(1000)

def say(line):
    # One write: torchrun starts its ranks with -u, where print() writes a line's end by itself,
    # and the other rank's line may come between.
    sys.stdout.write(line + "\\n")

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
timer.configure(timer.FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
me, agent = os.getpid(), os.getppid()
say(f"rank {{rank}} of attempt {{attempt}} is {{me}}, its agent {{agent}}")
hangs = attempt in sys.argv[1]
with timer.expires(after=2 if hangs and rank == "1" else 60, scope="step"):
    if hangs and rank == "1": stuck_for_good()
if hangs: time.sleep(1000)
say(f"rank {{rank}} of attempt {{attempt}} finished")
"""


class Job:
    """A torchrun job, two ranks wide, whose agent has our server."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder
        self.reports = folder / "reports"
        self.script = folder / "rank.py"
        self.script.write_text(RANK.format(module=module))

    def run(
        self, hangs_in: str, restarts: int, status: int = 0, fifo: Path | None = None
    ) -> tuple[str, str]:
        """Run it; rank 1 hangs in the attempts whose numbers are in `hangs_in`."""
        python, *job = torchrun(2, str(self.script), hangs_in, restarts=restarts)
        installed = ["-m", "hangwatch.integrations.torch", "--report-dir", str(self.reports)]
        return finish(
            [python, *installed, *job],
            self.folder,
            status=status,
            TORCHELASTIC_ENABLE_FILE_TIMER="1",
            **({} if fifo is None else {"TORCHELASTIC_TIMER_FILE": str(fifo)}),
        )


@pytest.mark.parametrize("preset", [False, True], ids=["path of its own", "preset path"])
@pytest.mark.parametrize("module", ["hangwatch", TORCH_S])
def test_the_agent_lives_and_restarts_the_group(tmp_path: Path, module: str, preset: bool) -> None:
    job = Job(tmp_path, module)
    fifo = tmp_path / "fifo" if preset else None
    # A new server follows at every restart, on a preset path the same.
    stdout, stderr = job.run("01", restarts=2, fifo=fifo)
    assert "rank 0 of attempt 2 finished\n" in stdout
    assert "rank 1 of attempt 2 finished\n" in stdout
    assert len(set(re.findall(r"its agent (\d+)", stdout))) == 1, "one agent for all attempts"
    assert fifo is None or not fifo.exists()
    for pid in re.findall(r"is (\d+), its agent", stdout):
        wait_until(lambda pid=pid: not is_alive(int(pid)), "every rank is gone")  # type: ignore[misc]
    if module == "hangwatch":
        assert "in stuck_for_good" in stderr
        assert len(list(job.reports.iterdir())) == 2


def test_when_restarts_run_out_the_final_error_shows_where_it_hung(tmp_path: Path) -> None:
    job = Job(tmp_path, "hangwatch")
    _, stderr = job.run("0", restarts=0, status=1)
    report = only_report(job.reports)
    assert report["outcome"] == "reaped"
    _, _, root_cause = stderr.rpartition("Root Cause (first observed failure):")
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "exitcode  : -9 " in root_cause
    assert f"(pid {report['worker']['pid']}) overran 'step'" in root_cause
    assert "in stuck_for_good\n" in root_cause


def test_importing_hangwatch_imports_no_torch() -> None:
    script = "import sys, hangwatch; print('torch' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", script], text=True, env=os.environ)
    assert out == "False\n"


# -- names and signatures

MODULES = ["", ".api", ".local_timer", ".file_based_local_timer", ".debug_info_logging"]
COMPARED = """
import importlib, inspect, sys, types
import hangwatch.timer

def parameters(function):
    return [
        (one.name, one.kind, one.default)
        for one in inspect.signature(function).parameters.values()
    ]

def public(there):
    return [
        name for name in getattr(there, "__all__", vars(there))
        if not name.startswith("_")
        and isinstance(vars(there)[name], (type, types.FunctionType))
        and vars(there)[name].__module__.startswith(sys.argv[1])
    ]

for module in sys.argv[2].split(","):
    theirs = importlib.import_module(sys.argv[1] + module)
    ours = importlib.import_module("hangwatch.timer" + module)
    for name in public(theirs):
        its, mine = getattr(theirs, name), getattr(ours, name)
        compared = [(name, its, mine)]
        if isinstance(its, type):
            methods = [
                method for method, value in vars(its).items()
                if isinstance(value, (types.FunctionType, staticmethod))
                and (not method.startswith("_") or method in ("__init__", "_reap_worker"))
            ]
            compared = [(f"{name}.{m}", getattr(its, m), getattr(mine, m)) for m in methods]
        for shown, its, mine in compared:
            # Ours may take more; what PyTorch's take, ours take by the same name and place.
            wanted = [one[:2] for one in parameters(its)]
            if [one[:2] for one in parameters(mine)][: len(wanted)] != wanted:
                print(module, shown, parameters(its), parameters(mine))
        print("compared", name)
"""


def test_names_and_parameters_are_pytorch_s() -> None:
    command = [sys.executable, "-c", COMPARED, TORCH_S, ",".join(MODULES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if not line.startswith("compared ")] == []
    names = {line.removeprefix("compared ") for line in lines}
    assert {"FileTimerServer", "LocalTimerServer", "RequestQueue", "expires"} <= names
