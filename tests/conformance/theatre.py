"""Have scenarios played against one implementation, and keep what came of them for the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from conformance.play import ERRORS, OUTCOME
from conformance.row import Outcome, Row
from support.namespaces import run_alone

OURS = "hangwatch"
TORCH = "torch.distributed.elastic.timer"
RESULTS_VARIABLE = "HANGWATCH_CONFORMANCE_RESULTS"
"""Names the folder in which every scenario leaves its result, if it is set."""

_ENDS_WITHIN = 50.0
_TESTS = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario leaves for the table."""

    row_id: str
    pair: str
    implementation: str
    version: str
    figure: str


class Theatre:
    """A process that plays scenarios against one implementation, begun when it is first needed.

    Args:
        implementation: the module under test.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Theatre:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def play(self, row: Row, pair: str) -> Outcome:
        """Play a row's scenario in a process, and a folder, of its own.

        Raises:
            AssertionError: it failed, or did not come to an end.
        """
        with tempfile.TemporaryDirectory(prefix="hw-conformance-") as folder:
            if row.alone:
                script = "from conformance.play import play; play(*sys.argv[1:])"
                run_alone(script, row.id, pair, self.implementation, folder)
            else:
                self._ask(row.id, pair, folder)
            outcome = Outcome(**json.loads(Path(folder, OUTCOME).read_text()))
        self._keep(row, pair, outcome)
        return outcome

    def _ask(self, row_id: str, pair: str, folder: str) -> None:
        process = self._process = self._process or self._open()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        try:
            process.stdin.write(json.dumps([row_id, pair, folder]) + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], _ENDS_WITHIN)[0]:
                answer = process.stdout.readline().strip()
        finally:
            if not answer:
                self._close()
        if answer != "0":
            errors = Path(folder, ERRORS)
            said = errors.read_text(errors="replace") if errors.exists() else "nothing"
            what = f"ended with {answer}" if answer else f"had no end within {_ENDS_WITHIN:g} s"
            raise AssertionError(f"the scenario {what}: {said[-5000:]}")

    def _open(self) -> subprocess.Popen[str]:
        paths = [_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, "-m", "conformance.play", self.implementation],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # Its death is a signal to a scenario that is still being played: that one cleans up.
        with process:
            process.terminate()

    def _keep(self, row: Row, pair: str, outcome: Outcome) -> None:
        results = os.environ.get(RESULTS_VARIABLE)
        if not results:
            return
        # The distribution has the name of the topmost package.
        distribution = self.implementation.partition(".")[0]
        version = importlib.metadata.version(distribution).partition("+")[0]
        result = Result(row.id, pair, self.implementation, version, outcome.figure)
        path = Path(results) / f"{row.id}-{pair}-{self.implementation}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)) + "\n")
