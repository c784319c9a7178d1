"""A wall clock that can be stepped, for whole processes: libfaketime.

CLOCK_MONOTONIC is left as it is, as a step of the real clock would leave it.
"""

from __future__ import annotations

import os
from pathlib import Path

_HERE = Path(__file__).parent


class SteppedClock:
    """The wall clock of every process that has its `environment`.

    Args:
        path: the file in which its offset stands.

    Raises:
        FileNotFoundError: libfaketime isn't installed.
    """

    def __init__(self, path: Path) -> None:
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
        if library is None:
            raise FileNotFoundError("no libfaketime to step the wall clock with")
        self._path = path
        self.step(0)
        found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": os.pathsep.join([str(_HERE / "faketime"), *filter(None, found)]),
        }

    def step(self, seconds: int) -> None:
        """Step it to so many seconds from the real one."""
        # At once: who reads it meanwhile must not find half an offset.
        draft = self._path.with_suffix(".draft")
        draft.write_text(f"{seconds:+d}s\n")
        draft.replace(self._path)
