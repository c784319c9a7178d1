"""A pid namespace of its own for what aims signals at others: nobody else can be hit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

_UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]

# In a user namespace we are root, and the true root may have a folder of that name.
OWN_FOLDER = """
import os, subprocess
from hangwatch.folder import known_folder
if os.path.exists(known_folder()) and os.stat(known_folder()).st_uid != os.geteuid():
    mount = ["mount", "-t", "tmpfs", "-o", "mode=700", "hangwatch", known_folder()]
    subprocess.run(mount, check=True)
"""


@functools.cache
def prefix() -> list[str] | None:
    """Return what a command in a new pid namespace begins with; None: it can't be had."""
    for more in ([], ["--user", "--map-root-user"]):
        command = [*_UNSHARE, *more]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    return None


def run_alone(script: str, *arguments: str) -> str:
    """Run a Python script in a pid namespace of its own; return what it printed.

    The script finds the tests' `support` package, and fails the test by its traceback.
    """
    command = prefix()
    if command is None:
        pytest.skip("no pid namespaces: neither root nor user namespaces")
    path = [entry for entry in sys.path if entry.endswith("tests")]
    program = f"import sys; sys.path[:0] = {path!r}\n{OWN_FOLDER}\n{script}"
    result = subprocess.run(
        [*command, sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
