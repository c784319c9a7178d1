"""Sleeps of a second and more, in the scripts of the documents, last until there is a report.

So a script of which one is to be reported does not end before, however slow the machine is.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

_FOLDER = Path(os.environ.get("HANGWATCH_TEST_REPORTS", "hangwatch-reports")).absolute()
_LONG = 1.0
_sleep, _sleep_in_loop = time.sleep, asyncio.sleep


def _must_last(seconds: float) -> bool:
    return seconds >= _LONG and not any(_FOLDER.glob(f"[!.]*-{os.getpid()}*/report.json"))


def sleep(seconds: float) -> None:
    """Sleep at least so long."""
    _sleep(seconds)
    while _must_last(seconds):
        _sleep(0.01)


async def sleep_in_loop(seconds: float) -> None:
    """Sleep at least so long, and let other tasks run."""
    await _sleep_in_loop(seconds)
    while _must_last(seconds):
        await _sleep_in_loop(0.01)


time.sleep = sleep  # type: ignore[assignment]
asyncio.sleep = sleep_in_loop  # type: ignore[assignment]
