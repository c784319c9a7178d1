"""`python -m conformance.play ROW PAIR IMPLEMENTATION FOLDER`: play one scenario.

Prints how it came out, as one line of JSON.

Ends every process that the scenario started, however it ends itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from types import FrameType

import psutil

from conformance.contract import row_of
from conformance.stage import Stage

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(row_id: str, pair: str, implementation: str, folder: str) -> None:
    """Play a row's scenario in a folder; the last line of the output is its outcome."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Whom a dead server leaves behind becomes ours, so that we can end it; prctl(2).
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _end)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.chdir(folder)
    status = 1
    try:
        outcome = row_of(row_id).scenario(Stage(implementation, pair))
        print(json.dumps(asdict(outcome)), flush=True)
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


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


if __name__ == "__main__":
    main(*sys.argv[1:])
