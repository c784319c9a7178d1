"""Imported at the start of a process under libfaketime, whose `clock_nanosleep` is broken.

Up to version 0.9.10 it fails for CLOCK_MONOTONIC with an absolute time, which is what
`time.sleep` has used since Python 3.11 (libfaketime issue 426). select(2) is left alone.
"""

import select
import time
from typing import SupportsIndex


def _sleep(seconds: float | SupportsIndex, /) -> None:
    select.select([], [], [], float(seconds))


time.sleep = _sleep
