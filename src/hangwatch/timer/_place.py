"""The address file of a companion watcher: how a pair's client finds it.

A queue or a FIFO has a device and an inode. The address file is named after them. It is a symbolic
link in the user's own folder, to the socket of the watcher. The name has the version in it: a
client of another one finds no watcher, and uses the pair's own transport, which both know.
"""

from __future__ import annotations

import contextlib
import os

from hangwatch.folder import known_folder
from hangwatch.page.layout import VERSION

_NAMES_BEGIN = f"v{VERSION}-pair-"


def link_of(status: os.stat_result) -> str:
    """Return the address file of the queue's pipe, or the FIFO, that has this status."""
    return f"{known_folder()}/{_NAMES_BEGIN}{status.st_dev:x}-{status.st_ino:x}"


def publish(link: str, address: str) -> None:
    """Write the address file, in one step; it replaces the one that a dead server left.

    Raises:
        OSError: the folder can't be written to.
    """
    new = f"{link}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(address, new)
    os.replace(new, link)


def withdraw(link: str, address: str) -> None:
    """Remove the address file, if it still leads to that watcher."""
    with contextlib.suppress(OSError):
        if os.readlink(link) == address:
            os.unlink(link)


def sweep() -> None:
    """Remove the address files of servers that were killed."""
    with contextlib.suppress(OSError), os.scandir(known_folder()) as entries:
        for entry in entries:
            if entry.name.startswith(_NAMES_BEGIN) and not os.path.exists(entry.path):
                withdraw(entry.path, os.readlink(entry.path))
