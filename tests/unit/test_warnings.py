"""A worker's warning, where `logging` is not loaded, harms neither the program nor its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
import hangwatch
{first}
with hangwatch.expires(60, "x"):
    pass
assert "logging" not in sys.modules
print("ran")
"""
REUSES_ITS_NUMBER = """
os.close(2)
assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) == 2
"""
IS_FULL = """
read_end, write_end = os.pipe()
os.set_blocking(write_end, False)
try:
    while True:
        os.write(write_end, bytes(4096))
except BlockingIOError:
    os.set_blocking(write_end, True)
"""
IS_BROKEN = """
read_end, write_end = os.pipe()
os.close(read_end)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
"""
# Stands for a program that was started with it.
WITH_IT = """
os.dup2(write_end, 2)
import importlib
importlib.reload(sys.modules["hangwatch.worker.warnings"])
"""


def run(first: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first), *arguments],
        env={**os.environ, "HANGWATCH_ADDRESS": "/nobody/listens/here"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_is_a_line_on_standard_error() -> None:
    result = run("")
    assert (result.returncode, result.stdout) == (0, "ran\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("hangwatch: there is no watcher at /nobody")
    assert line.endswith("; this process runs on unwatched")


def test_nothing_is_written_to_a_file_that_has_got_the_number_of_standard_error(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    result = run(REUSES_ITS_NUMBER, str(data))
    assert (result.returncode, result.stdout) == (0, "ran\n")
    assert data.read_bytes() == b""


@pytest.mark.parametrize("state", [IS_FULL, IS_BROKEN], ids=["full", "broken"])
def test_a_pipe_that_nobody_reads_neither_holds_up_nor_ends_the_program(state: str) -> None:
    result = run(state + WITH_IT)
    assert (result.returncode, result.stdout) == (0, "ran\n")
