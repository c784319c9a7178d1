"""What the watcher was told to do about a block that overran."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OnExpiry(StrEnum):
    """What happens to a worker whose block overran."""

    REAP = "reap"
    """Write down why, kill it, confirm its death."""
    REPORT = "report"
    """Write down why and leave it alone."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The watcher's settings.

    Attributes:
        on_expiry: what happens to a worker whose block overran.
        grace: seconds between SIGTERM and SIGKILL; 0: SIGKILL at once.
        tree: whether the worker's descendants are killed with it.
        report_dir: absolute path of the report folder; None keeps no reports.
        allowed_uids: the users whose processes are watched.
        spared_pid: a process that is reported on and never signalled; 0: none.
    """

    on_expiry: OnExpiry
    grace: float
    tree: bool
    report_dir: str | None
    allowed_uids: frozenset[int]
    spared_pid: int = 0
