"""torchrun jobs, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENDS_WITHIN = 250.0


def torchrun(ranks: int, *arguments: str, restarts: int = 1) -> list[str]:
    # --standalone: a free port, and a run id of its own.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    counts = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [*launcher, *counts, *arguments]


def finish(command: list[str], cwd: Path, status: int = 0, **environment: str) -> tuple[str, str]:
    """Run a command that must end with `status`; return what it wrote to stdout and stderr."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            stdout, stderr = job.communicate(timeout=ENDS_WITHIN)
        except BaseException:
            job.terminate()  # torchrun ends its ranks
            try:
                job.communicate(timeout=20)
            finally:
                job.kill()
            raise
    assert job.returncode == status, f"exit status {job.returncode}\n{stdout}\n{stderr}"
    return stdout, stderr


def only_report(report_dir: Path) -> dict[str, Any]:
    folders = list(report_dir.iterdir())
    assert len(folders) == 1, folders
    report: dict[str, Any] = json.loads((folders[0] / "report.json").read_text())
    return report
