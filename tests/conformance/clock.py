"""A wall clock that a scenario can step, for processes that it starts and nobody else.

Nothing may step the machine's own clock in a test. So ``time.time`` of the server's process and
of whatever it forks or starts is the real one and an offset, which stands in a file.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

VARIABLE = "CONFORMANCE_CLOCK"
_OFFSET = struct.Struct("d")


class SteppedClock:
    """The clock of one file.

    Args:
        path: where the offset stands; made if it isn't there.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with open(path, "a+b") as file:
            os.truncate(path, _OFFSET.size)
            self._offset = mmap.mmap(file.fileno(), _OFFSET.size)

    def step(self, seconds: float) -> None:
        """Step the clock, in every process that has it."""
        _OFFSET.pack_into(self._offset, 0, seconds)

    def install(self) -> None:
        """Make it this process's wall clock, and that of all that come from this process."""
        real = time.time

        def stepped() -> float:
            return real() + float(_OFFSET.unpack_from(self._offset, 0)[0])

        time.time = stepped
        # Python imports a sitecustomize when it starts: it installs the clock there, too.
        os.environ[VARIABLE] = self._path
        here = str(Path(__file__).parent / "stepped_clock")
        above = str(Path(__file__).parents[1])
        found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([here, above, *filter(None, found)])
