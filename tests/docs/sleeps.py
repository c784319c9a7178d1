"""Sleeps of a second and more, in the scripts of the documents, last until there is a report.

So a script of which one is to be reported does not end before, however slow the machine is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_FOLDER = Path(os.environ.get("HANGWATCH_TEST_REPORTS", "hangwatch-reports")).absolute()
_LONG = 1.0
_sleep = time.sleep


def sleep(seconds: float) -> None:
    """Sleep at least so long."""
    _sleep(seconds)
    while seconds >= _LONG and not any(_FOLDER.glob(f"[!.]*-{os.getpid()}*/report.json")):
        _sleep(0.01)


time.sleep = sleep  # type: ignore[assignment]
