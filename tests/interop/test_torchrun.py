"""A real torchrun job: a rank that hangs is explained and killed, and the job goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.jobs import finish, only_report, torchrun

SCRIPT = Path(__file__).parents[2] / "examples" / "ddp_digits.py"
# Of a step: a rank that is well keeps it, also where the machine stands still for a while.
LIMIT = ["--limit", "20"]

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]


def hangwatch_run(report_dir: Path) -> list[str]:
    return [sys.executable, "-m", "hangwatch", "run", "--report-dir", str(report_dir), "--"]


def accuracy(stdout: str) -> float:
    found = re.search(r"^finished: accuracy (\d\.\d+) ", stdout, re.MULTILINE)
    assert found, stdout
    return float(found[1])


def test_hung_rank_is_killed_and_the_job_goes_on(tmp_path: Path) -> None:
    hang = ["--hang-rank", "2", "--hang-at-step", "20", *LIMIT]
    job = torchrun(4, str(SCRIPT), *hang)
    stdout, stderr = finish([*hangwatch_run(tmp_path / "reports"), *job], tmp_path)

    report = only_report(tmp_path / "reports")
    assert report["outcome"] == "reaped"
    assert report["scope"]["name"] == "forward"
    assert report["scope"]["limit_s"] == 20
    assert report["worker"]["labels"]["rank"] == "2"
    assert report["worker"]["labels"]["restart_count"] == "0"
    (holder,) = (thread for thread in report["threads"] if thread["holds_scope"])
    assert "stop_in_c" in [frame["function"] for frame in holder["frames"]]
    inside = [scope["name"] for other in report["others"] for scope in other["scopes"]]
    assert "all_reduce" in inside
    assert report["headline"] in stderr
    assert "attempt 2" not in stdout

    resumed = re.search(r"^attempt 1: resumed from step (\d+)$", stdout, re.MULTILINE)
    assert resumed, stdout
    assert int(resumed[1]) in (5, 10, 15, 20)
    assert f"resumed from step {resumed[1]}\n" in stdout[stdout.index("finished: ") :]
    assert accuracy(stdout) > 0.8


def test_when_restarts_run_out_the_final_error_shows_where_it_hung(tmp_path: Path) -> None:
    job = torchrun(2, str(SCRIPT), "--hang-rank", "1", "--hang-at-step", "5", *LIMIT, restarts=0)
    _, stderr = finish([*hangwatch_run(tmp_path / "reports"), *job], tmp_path, status=1)

    report = only_report(tmp_path / "reports")
    assert report["outcome"] == "reaped"
    assert report["actions"][0]["action"] == "error file"
    _, _, root_cause = stderr.rpartition("Root Cause (first observed failure):")
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "exitcode  : -9 " in root_cause
    assert f"(pid {report['worker']['pid']}) overran 'forward'" in root_cause
    assert "in stop_in_c\n" in root_cause


def test_job_that_does_not_hang_is_left_alone(tmp_path: Path) -> None:
    job = torchrun(4, str(SCRIPT), *LIMIT)
    stdout, stderr = finish([*hangwatch_run(tmp_path / "reports"), *job], tmp_path)
    assert not (tmp_path / "reports").exists()
    assert "hangwatch" not in stderr
    assert "resumed" not in stdout
    assert accuracy(stdout) > 0.8


def test_same_script_runs_unwatched(tmp_path: Path) -> None:
    job = torchrun(2, str(SCRIPT), "--steps", "10")
    stdout, stderr = finish(job, tmp_path, HANGWATCH_ADDRESS="off")
    assert "hangwatch" not in stderr
    assert accuracy(stdout) > 0.1
