"""All rows, in the contract's order, and how one is played.

A scenario is played in a process of its own, in a folder of its own, which is the current one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Never

# Each of these has some of the rows.
import conformance.killing
import conformance.lateness
import conformance.scopes
import conformance.service
import conformance.transport  # noqa: F401
from conformance.row import ROWS as _FOUND
from conformance.row import Outcome, Row
from conformance.stage import SOON, Stage
from hangwatch import linux
from support.processes import end_everybody

_ORDER = (
    *("scope-name", "scope-cost", "threads", "recursion", "gil-arm", "queue-lock", "false-kill"),
    *("server-gil", "late", "wall-clock", "pid-reuse", "forged", "agent-suicide", "masked-error"),
    *("slow-server", "hold-open", "garbage", "retry", "lifecycle", "log-storm", "scan", "silent"),
)


def _plain_hang(stage: Stage) -> Outcome:
    stage.play(stage.hang_after(1), max_interval=SOON)
    return stage.must_be_killed()


CONTROL = Row("plain-hang", "A hang is ended.", _plain_hang)
"""What every implementation does, or else nothing that the rows show means anything."""

ROWS = sorted(_FOUND, key=lambda row: _ORDER.index(row.id))
assert tuple(row.id for row in ROWS) == _ORDER
CASES = [(row, pair) for row in ROWS for pair in row.pairs]
"""Every row of the table."""


def play(row_id: str, pair: str, implementation: str) -> Never:
    """Play a row's scenario, print how it came out, and end this process.

    Ends every process that the scenario started, however it ends itself.
    """
    # Whom a dead server leaves behind becomes ours, so that we can end it.
    linux.become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    (row,) = (row for row in [*ROWS, CONTROL] if row.id == row_id)
    answer = ""
    try:
        answer = json.dumps(asdict(row.scenario(Stage(implementation, pair))))
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_everybody()
        print(answer, flush=True)
        sys.stderr.flush()
        # Not through multiprocessing's exit handlers, which would wait for those we have ended.
        os._exit(not answer)
