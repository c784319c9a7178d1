"""What a newcomer sees of `make` where something is missing, and of `make cases`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases.__main__ import all_hold
from support.namespaces import prefix

ROOT = Path(__file__).parents[2]
FILLED = """
mount -t tmpfs -o size=8m tmpfs "$1" && exec "$2" "$3" "$1/environment" click
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment},
    )


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_make_without_a_usable_python_says_what_to_do(python: str) -> None:
    result = run("make", "--always-make", ".venv/ready", f"PYTHON={python}")
    assert result.returncode != 0
    assert result.stderr.startswith("hangwatch needs Python 3.11 or newer: name one with 'make")
    assert len(result.stderr.splitlines()) == 2, "the second line is make's own"


@pytest.mark.long
def test_an_environment_without_network_says_so_in_one_line(tmp_path: Path) -> None:
    alone = prefix()
    if alone is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    folder = tmp_path / "environment"
    program = ROOT / "scripts/environment.py"
    command = [*alone, "--net", sys.executable, str(program), str(folder)]
    # Nothing that pip may have kept, or been told, is of use.
    nothing = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    result = run(*command, "click", **nothing)
    assert result.returncode == 1
    assert result.stderr.startswith("PyPI can't be reached")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.long
def test_an_environment_on_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    alone = prefix()
    if alone is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    program = ROOT / "scripts/environment.py"
    result = run(*alone, "sh", "-c", FILLED, "sh", tmp_path, sys.executable, program)
    assert result.returncode == 1
    assert result.stderr == f"the disk of {tmp_path} is full: free about 200 MB and try again\n"


def test_make_cases_says_where_it_looks_for_them(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "cases", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"There are no cases in {tmp_path}.")


@pytest.mark.parametrize(
    ("last_line", "holds"),
    [
        ("2 ok, 0 FAIL, 0 skipped", True),
        ("2 ok, 1 FAIL, 0 skipped", False),
        ("1 ok, 0 FAIL, 1 skipped", False),
        ("", False),
    ],
)
def test_a_case_that_fails_or_is_skipped_is_not_shown(last_line: str, holds: bool) -> None:
    assert all_hold(last_line) is holds


RUN_CASES = """
import os, sys
print("interpreter:", sys.executable == os.environ["PYTHON311"])
print("1 ok, 0 FAIL, 1 skipped")
"""


@pytest.mark.long
@pytest.mark.timeout(900)  # it makes an environment
def test_make_cases_runs_each_version_s_interpreter(tmp_path: Path) -> None:
    (tmp_path / "run-cases").write_text(RUN_CASES)
    result = run(sys.executable, "-m", "cases", tmp_path, "--python", "3.11")
    assert result.returncode == 1, result.stderr
    assert "interpreter: True" in result.stdout
    assert result.stdout.splitlines()[-1] == "cases on 3.11: 1 ok, 0 FAIL, 1 skipped"
