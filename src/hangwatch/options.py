"""What a user may tell a watcher, from Python or on the command line, checked in one place."""

from __future__ import annotations

import os
from typing import TypedDict

from hangwatch.folder import REPORT_DIR
from hangwatch.watcher.settings import OnExpiry, Settings
from hangwatch.worker.arguments import checked_grace, checked_limit, checked_signal


class Options(TypedDict, total=False):
    """The options of `hangwatch.serve`, which explains them."""

    report_dir: str | os.PathLike[str] | None
    on_expiry: str
    force: bool
    grace: float
    signal: int | None
    tree: bool
    gap: float | None
    stacks: bool
    kill_debugged: bool


def checked_settings(
    *,
    report_dir: str | os.PathLike[str] | None = REPORT_DIR,
    on_expiry: str = "reap",
    force: bool = False,
    grace: float = 0.0,
    signal: int | None = None,
    tree: bool = True,
    gap: float | None = None,
    stacks: bool = True,
    kill_debugged: bool = False,
    spared_pid: int = 0,
) -> Settings:
    """Make a watcher's settings of what a user said.

    Raises:
        ValueError, TypeError: something is none of what it may be: the caller's fault.
    """
    if on_expiry not in list(OnExpiry):
        raise ValueError(f"on_expiry must be 'reap', 'raise' or 'report', not {on_expiry!r}")
    try:
        checked_gap = 0.0 if gap is None else checked_limit(gap)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("after", "gap", 1).partition(": leave")[0]) from None
    return Settings(
        on_expiry=OnExpiry(on_expiry),
        force=force,
        signal=0 if signal is None else checked_signal(signal),
        grace=checked_grace(grace),
        tree=tree,
        gap=checked_gap,
        stacks=stacks,
        kill_debugged=kill_debugged,
        report_dir=None if report_dir is None else os.path.abspath(report_dir),
        allowed_uids=frozenset({os.geteuid()}),
        spared_pid=spared_pid,
    )
