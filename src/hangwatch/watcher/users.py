"""Whose processes may be watched, checked."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable

from hangwatch.errors import LaunchError

# linux/capability.h. To signal another user's process, and to see its descriptors in /proc.
_NEEDED = {"CAP_KILL": 5, "CAP_SYS_PTRACE": 19}
_LAST_UID = 2**32 - 2


def checked_uid(user: int | str) -> int:
    """Return the number of a user who may be allowed.

    Args:
        user: a number, also in digits, or a name.

    Raises:
        ValueError: there is no such user, or others are shown by the same number.
        TypeError: it is neither a number nor a name.
    """
    if isinstance(user, bool) or not isinstance(user, int | str):
        raise TypeError(f"a user is a number or a name, not {type(user).__name__}")
    if isinstance(user, str) and not (user.isascii() and user.isdigit()):
        try:
            uid = pwd.getpwnam(user).pw_uid
        except (KeyError, ValueError):
            raise ValueError(f"there is no user {user!r}: give a user's name or number") from None
    else:
        uid = int(user)
    if not 0 <= uid <= _LAST_UID:
        raise ValueError(f"{uid} is no user's number: they go from 0 to {_LAST_UID}")
    if uid == _number_of_strangers():
        raise ValueError(
            f"in this user namespace everybody whom it doesn't map looks like user {uid}: "
            "run the workers as another user"
        )
    return uid


def checked_users(users: Iterable[int | str]) -> frozenset[int]:
    """Return the numbers of the users whose processes may be watched, our own among them.

    Raises:
        ValueError, TypeError: one of them is no user: the caller's fault.
        LaunchError: this process lacks the rights to watch the processes of other users.
    """
    if isinstance(users, str) or not isinstance(users, Iterable):
        raise TypeError(f"allow_uids must be a list of users, not {users!r:.60}")
    ours = os.geteuid()
    allowed = frozenset(map(checked_uid, users)) | {ours}
    others = ", ".join(map(str, sorted(allowed - {ours})))
    if others and ours != 0:
        raise LaunchError(
            f"user {ours} can neither signal nor look into processes of user {others}: "
            "start the watcher as root, or one as each user"
        )
    missing = [name for name, bit in _NEEDED.items() if others and not _has_capability(bit)]
    if missing:
        raise LaunchError(
            f"without {' and '.join(missing)} root can't watch processes of user {others}: "
            "start the watcher with it (docker run --cap-add, AmbientCapabilities= in a unit), "
            "or one as each user"
        )
    return allowed


def _number_of_strangers() -> int | None:
    """Return the number of whom our user namespace doesn't map; None: it maps everybody.

    Source: user_namespaces(7).
    """
    try:
        with open("/proc/self/uid_map") as uid_map:
            mapped = sum(int(line.split()[2]) for line in uid_map)
        with open("/proc/sys/kernel/overflowuid") as overflow:
            number = int(overflow.read())
    except (OSError, ValueError, IndexError):  # no /proc: no user namespaces either
        return None
    return number if mapped <= _LAST_UID else None


def _has_capability(bit: int) -> bool:
    """Tell whether this process has a capability; capabilities(7), proc(5)."""
    try:
        with open("/proc/self/status") as status:
            effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return True  # unknown; what fails will say so
    return bool(int(effective, 16) >> bit & 1)
