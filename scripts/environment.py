"""Make a virtual environment and install into it: `environment.py FOLDER REQUIREMENT...`.

The Makefile calls this. It says what it does and how far it is, keeps pip's own output to itself,
and turns what goes wrong into one line that says what to do.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_NO_NETWORK = ("NewConnectionError", "Temporary failure in name resolution", "ProxyError")
_NO_NETWORK += ("Connection refused", "Network is unreachable", "No matching distribution found")
_NO_NETWORK += ("ReadTimeoutError", "ConnectTimeoutError")
_ROOM = 20 << 20
_PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "2")


class EnvironmentFailedError(Exception):
    """The environment can't be made; the message says why, and what to do."""


def create(folder: Path) -> None:
    """Make the environment, unless there is one that works."""
    with contextlib.suppress(OSError):
        if subprocess.run([folder / "bin/python", "-c", ""], check=False).returncode == 0:
            return
    shutil.rmtree(folder, ignore_errors=True)
    made = _run([sys.executable, "-m", "venv", str(folder)])
    if made is not None:
        if "ensurepip is not available" in made:
            made = "it has no ensurepip: install it (Debian: apt-get install python3-venv)"
        made = _last_error(made)
        raise EnvironmentFailedError(
            f"{sys.executable} can't make the environment {folder}: {made}"
        )


def install(folder: Path, requirements: list[str]) -> None:
    """Install what is named, as pip takes it."""
    said = _run([str(folder / "bin/python"), *_PIP, *requirements])
    if said is None:
        return
    if any(words in said for words in _NO_NETWORK):
        raise EnvironmentFailedError(
            f"PyPI can't be reached, or lacks what is needed ({_last_error(said)}): "
            "check the network, or pip's configuration, and try again"
        )
    raise EnvironmentFailedError(f"pip failed: {_last_error(said)}")


def _run(command: list[str]) -> str | None:
    """Run a command; None if it succeeds, else what it said."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    said = result.stdout.decode(errors="replace")
    return None if result.returncode == 0 else said


def _last_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")] or lines or ["no reason given"]
    return errors[-1].removeprefix("ERROR: ")


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say what is being done, for how long already, and when it is done."""
    began, over = time.monotonic(), threading.Event()
    live = sys.stdout.isatty()

    def count() -> None:
        while not over.wait(1.0):
            print(f"\r{what} ... {time.monotonic() - began:.0f} s", end="", flush=True)

    print(f"{what} ...", end="", flush=True)
    counter = threading.Thread(target=count, daemon=True)
    if live:
        counter.start()
    try:
        yield
        over.set()
        print(
            f"\r{what}: done in {time.monotonic() - began:.0f} s" if live else " done", flush=True
        )
    except BaseException:
        over.set()
        print(flush=True)
        raise


def main(folder: Path, requirements: list[str]) -> int:
    """Make the environment and fill it; the exit status says whether that worked."""
    try:
        with progress(f"setting up {folder.name} (Python {sys.version.split()[0]})"):
            create(folder)
            install(folder, requirements)
    except (EnvironmentFailedError, OSError) as error:
        full = next((path for path in _written_to(folder) if _is_full(path)), None)
        advice = f"the disk of {full} is full: free about 200 MB and try again"
        print(error if full is None else advice, file=sys.stderr)
        return 1
    return 0


def _written_to(folder: Path) -> list[Path]:
    """Return where making an environment writes: beside us, and temporary files."""
    return [folder.absolute().parent, Path(tempfile.gettempdir())]


def _is_full(path: Path) -> bool:
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(path)
        return usage.total > 0 and usage.free < _ROOM
    return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
