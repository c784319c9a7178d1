"""What a watcher is told, and what a caller may tell it, checked in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hangwatch.folder import REPORT_DIR
from hangwatch.policy import DEFAULT, OPTIONS, Policy, checked, checked_limit, decide
from hangwatch.watcher.users import checked_users

if TYPE_CHECKING:
    from typing import Unpack

    from hangwatch.policy import PolicyOptions

    class Options(PolicyOptions, total=False):
        """The options of `hangwatch.serve`, which explains them."""

        report_dir: str | os.PathLike[str] | None
        gap: float | None
        allow_uids: Iterable[int | str]


@dataclass(frozen=True, slots=True)
class Settings:
    """A watcher's settings.

    Attributes:
        policy: what an overrun leads to, as far as a block doesn't choose it.
        gap: seconds that a worker may stay outside of every block; None: for ever.
        report_dir: absolute path of the report folder; None keeps no reports.
        allowed_uids: the users whose processes are watched.
        spared_pid: a process that is reported on and never signalled; 0: none.
    """

    policy: Policy = DEFAULT
    gap: float | None = None
    report_dir: str | None = None
    allowed_uids: frozenset[int] = frozenset()
    spared_pid: int = 0

    def other_users(self) -> list[int]:
        """Return the users besides our own whose processes are watched."""
        return sorted(self.allowed_uids - {os.geteuid()})

    def decide(self, block: Policy, pid: int, skipped: bool = False) -> Policy:
        """Decide what the overrun of a block of process `pid` leads to.

        Args:
            block: what the block chose.
            pid: the process.
            skipped: whether its thread has left a block that it had entered earlier.
        """
        return decide(block, self.policy, spared=skipped or pid == self.spared_pid)

    def options(self) -> dict[str, object]:
        """Return what `checked_settings` makes these settings of."""
        return {
            **self.policy._asdict(),
            "gap": self.gap,
            "report_dir": self.report_dir,
            "allow_uids": self.other_users(),
        }


def checked_settings(
    *,
    report_dir: str | os.PathLike[str] | None = REPORT_DIR,
    gap: float | None = None,
    allow_uids: Iterable[int | str] = (),
    **policy: Unpack[PolicyOptions],
) -> Settings:
    """Make a watcher's settings of what a caller gave; None: as if it was left out.

    Raises:
        ValueError, TypeError: something is none of what it may be: the caller's fault.
        LaunchError: this process lacks the rights to watch the processes of other users.
    """
    unknown = sorted(policy.keys() - OPTIONS.keys())
    if unknown:
        known = ", ".join(["on_event", "report_dir", *OPTIONS, "gap", "allow_uids"])
        raise TypeError(f"there is no option {unknown[0]!r}: there are {known}")
    chosen = {name: value for name, value in policy.items() if value is not None}
    return Settings(
        policy=checked(DEFAULT._replace(**chosen)),
        gap=None if gap is None else checked_limit("gap", gap, "leave it out for none"),
        report_dir=None if report_dir is None else _checked_folder(report_dir),
        allowed_uids=checked_users(allow_uids),
    )


def _checked_folder(report_dir: object) -> str:
    if not isinstance(report_dir, str | bytes | os.PathLike):
        raise TypeError(
            f"report_dir must be a path, or None for no reports, not {report_dir!r:.40}"
        )
    path = os.fsdecode(report_dir)
    if "\0" in path:
        raise ValueError(
            f"report_dir can't have a NUL in its name, as {path!r:.40} has: give another path"
        )
    return os.path.abspath(path)
