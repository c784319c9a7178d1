"""Have scenarios played against one implementation, and keep what came of them for the table."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

from conformance.row import Outcome, Row
from support.namespaces import run_alone
from support.nursery import LIMIT, Nursery

RESULTS_VARIABLE = "HANGWATCH_CONFORMANCE_RESULTS"
"""Names the folder in which every scenario leaves its result, if it is set."""

_PLAY = """
import os, sys
os.chdir(sys.argv.pop())
from conformance.contract import play
play(*sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario leaves for the table."""

    row_id: str
    pair: str
    implementation: str
    version: str
    figure: str


@functools.cache
def _nursery(implementation: str) -> Nursery:
    # PyTorch takes seconds to import.
    return Nursery(implementation, "conformance.contract")


def play(implementation: str, row: Row, pair: str) -> Outcome:
    """Play a row's scenario in a process, and a folder, of its own.

    Raises:
        AssertionError: it failed.
        subprocess.TimeoutExpired: it did not come to an end.
    """
    with tempfile.TemporaryDirectory(prefix="hw-conformance-") as folder:
        arguments = (row.id, pair, implementation, folder)
        if row.alone:
            said = run_alone(_PLAY, *arguments)
        else:
            worker = _nursery(implementation).fork(_PLAY, *arguments, stdin=DEVNULL, stderr=PIPE)
            try:
                said, errors = worker.communicate(timeout=2 * LIMIT)
            finally:
                worker.terminate()  # one that has no end ends all that it has started
                status = worker.wait()
            assert status == 0, errors[-5000:]
    outcome = Outcome(**json.loads(said))
    _keep(implementation, row, pair, outcome)
    return outcome


def _keep(implementation: str, row: Row, pair: str, outcome: Outcome) -> None:
    results = os.environ.get(RESULTS_VARIABLE)
    if not results:
        return
    # The distribution has the name of the topmost package.
    version = importlib.metadata.version(implementation.partition(".")[0]).partition("+")[0]
    result = Result(row.id, pair, implementation, version, outcome.figure)
    path = Path(results) / f"{row.id}-{pair}-{implementation}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result)) + "\n")
