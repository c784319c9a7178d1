"""`hangwatch demo`: four workers, a ring, a hang, and what the watcher makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hangwatch.cli import demo_worker
from hangwatch.errors import HangwatchError
from hangwatch.folder import REPORT_DIR
from hangwatch.timer.shared_memory_timer import SharedMemoryTimerServer

WORKERS = 4
HANGING_RANK = 2
_ENDS_WITHIN = 20.0


def run_demo() -> int:
    """Run the demo; return 0 only if everything happened that was promised."""
    console = Console()
    console.print(
        f"Four workers pass numbers round a ring, each step inside of a block that may take "
        f"{demo_worker.WORK_LIMIT:g} s.\nAt step {demo_worker.HANGS_AT} rank {HANGING_RANK} stops "
        "in a C call that holds the GIL, where no signal handler and no thread of it runs.\n"
    )
    began = time.time() - 2.0  # the kernel counts process starts in coarse ticks
    server = SharedMemoryTimerServer()
    try:
        server.start()
    except HangwatchError as error:
        console.print(f"hangwatch: {error}", style="red")
        return 1
    try:
        workers = _start_ring(str(server.address))
        console.print(f"pids {', '.join(str(worker.pid) for worker in workers)}; running ...\n")
        statuses = [_wait(worker) for worker in workers]
    finally:
        server.stop()
    pids = {worker.pid for worker in workers}
    found = [json.loads(path.read_text()) for path in Path(REPORT_DIR).glob("*/report.json")]
    # Pids come again: older reports may be of earlier processes.
    reports = [
        report
        for report in found
        if report["worker"]["pid"] in pids and report["worker"]["start_time"] >= began
    ]
    return _judge(console, workers, statuses, reports)


def _start_ring(address: str) -> list[subprocess.Popen[bytes]]:
    pipes = [os.pipe() for _ in range(WORKERS)]
    workers = []
    for rank in range(WORKERS):
        read_end, write_end = pipes[rank][0], pipes[(rank + 1) % WORKERS][1]
        environment = {
            **os.environ,
            "HANGWATCH_ADDRESS": address,
            "RANK": str(rank),
            "WORLD_SIZE": str(WORKERS),
        }
        hangs = ["--hang"] if rank == HANGING_RANK else []
        workers.append(
            subprocess.Popen(
                [sys.executable, demo_worker.__file__, str(read_end), str(write_end), *hangs],
                env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
                pass_fds=[read_end, write_end],
            )
        )
    for read_end, write_end in pipes:
        os.close(read_end)
        os.close(write_end)
    return workers


def _wait(worker: subprocess.Popen[bytes]) -> int:
    try:
        return worker.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return -1000


def _judge(
    console: Console,
    workers: list[subprocess.Popen[bytes]],
    statuses: list[int],
    reports: list[dict[str, object]],
) -> int:
    hung = workers[HANGING_RANK].pid
    text = json.dumps(reports)
    promises = {
        "the hung worker was killed": statuses[HANGING_RANK] == -9,
        "the three others survived": all(
            status == 0 for rank, status in enumerate(statuses) if rank != HANGING_RANK
        ),
        "there is one report, of the hung worker": [
            (report["outcome"], report["worker"]["pid"])  # type: ignore[index]
            for report in reports
        ]
        == [("reaped", hung)],
        "its stack shows where, though the GIL was held": f'"{demo_worker.stop_in_c.__name__}"'
        in text,
    }
    table = Table("promised", "happened", title="hangwatch demo")
    for promise, kept in promises.items():
        table.add_row(promise, "yes" if kept else "[red]NO[/red]")
    console.print(table)
    if not all(promises.values()):
        console.print("hangwatch demo: a promise was broken: see the table, and the log above")
        return 1
    console.print("hangwatch demo: all promises were kept")
    return 0
