"""Run one scenario against one implementation, and keep what came of it for the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from conformance.row import Outcome, Row
from support.namespaces import run_alone

OURS = "hangwatch"
TORCH = "torch.distributed.elastic.timer"
RESULTS_VARIABLE = "HANGWATCH_CONFORMANCE_RESULTS"
"""Names the folder in which every run leaves its result, if it is set."""

_ENDS_WITHIN = 45.0
_CLEANS_UP_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves for the table."""

    row_id: str
    pair: str
    implementation: str
    version: str
    figure: str


def run(row: Row, pair: str, implementation: str) -> Outcome:
    """Play a row's scenario in a process, and a folder, of its own."""
    with tempfile.TemporaryDirectory(prefix="hw-conformance-") as folder:
        arguments = [row.id, pair, implementation, folder]
        if row.alone:
            output = run_alone("from conformance.play import main; main(*sys.argv[1:])", *arguments)
        else:
            output = _run(*arguments)
    outcome = Outcome(**json.loads(output.splitlines()[-1]))
    results = os.environ.get(RESULTS_VARIABLE)
    if results:
        # The distribution is named as its topmost package is.
        version = importlib.metadata.version(implementation.partition(".")[0]).partition("+")[0]
        result = Result(row.id, pair, implementation, version, outcome.figure)
        path = Path(results) / f"{row.id}-{pair}-{implementation}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)) + "\n")
    return outcome


def _run(*arguments: str) -> str:
    tests = str(Path(__file__).parents[1])
    paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, "-m", "conformance.play", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_ENDS_WITHIN)
        except BaseException:
            process.terminate()  # it ends what it has started
            try:
                process.wait(_CLEANS_UP_WITHIN)
            finally:
                process.kill()
            raise
    assert process.returncode == 0, errors
    return output
