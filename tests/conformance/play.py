"""Where scenarios are played: a process that has imported one implementation, and forks for each.

`python -m conformance.play IMPLEMENTATION` plays what it is asked for on its standard input, a
line of JSON each, and answers with the exit status. PyTorch takes seconds to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Never

import psutil

from conformance.contract import row_of
from conformance.stage import Stage

OUTCOME = "outcome.json"
"""The file, in a scenario's folder, that says how it came out."""
ERRORS = "errors.txt"
"""The file for whatever its processes have to say besides."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def play(row_id: str, pair: str, implementation: str, folder: str) -> Never:
    """Play a row's scenario in a folder, as a process that ends with it.

    Ends every process that the scenario started, however it ends itself.
    """
    # Whom a dead server leaves behind becomes ours, so that we can end it.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _end)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    status = 1
    try:
        os.chdir(folder)
        outcome = row_of(row_id).scenario(Stage(implementation, pair))
        Path(folder, OUTCOME).write_text(json.dumps(asdict(outcome)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_everybody()
        sys.stderr.flush()
        # Not through multiprocessing's exit handlers, which would wait for those we have ended.
        os._exit(status)


def end_everybody() -> None:
    """Kill every process below this one, those included that appear meanwhile."""
    me = psutil.Process()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for process in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def serve(implementation: str) -> None:
    """Play what is asked for, one after the other, until nobody can ask any more."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    importlib.import_module(implementation)
    for line in sys.stdin:
        row_id, pair, folder = json.loads(line)
        pid = os.fork()
        if pid == 0:
            errors = os.open(f"{folder}/{ERRORS}", os.O_WRONLY | os.O_CREAT, 0o600)
            for descriptor, instead in ((0, os.open(os.devnull, os.O_RDONLY)), (1, errors)):
                os.dup2(instead, descriptor)
            os.dup2(errors, 2)
            play(row_id, pair, implementation, folder)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _prctl(option: int, value: int) -> None:
    # prctl(2)
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


if __name__ == "__main__":
    serve(sys.argv[1])
