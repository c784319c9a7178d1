"""Where a pair's client finds the watcher that its server started.

A queue or a FIFO is known by its device and inode. A symbolic link of that name, in the
user's own folder, leads to the socket of the watcher beside it. The name has the version in
it: a client of another one finds no watcher, and goes the legacy road, which it shares.
"""

from __future__ import annotations

import contextlib
import os

from hangwatch.folder import known_folder
from hangwatch.page.layout import VERSION

_NAMES_BEGIN = f"v{VERSION}-pair-"


def link_of(status: os.stat_result) -> str:
    """Return the link of the queue's pipe, or the FIFO, that has this status."""
    return f"{known_folder()}/{_NAMES_BEGIN}{status.st_dev:x}-{status.st_ino:x}"


def publish(link: str, address: str) -> None:
    """Let the link lead to a watcher, in one step; it replaces what a dead server left.

    Raises:
        OSError: the folder can't be written to.
    """
    new = f"{link}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(address, new)
    os.replace(new, link)


def withdraw(link: str, address: str) -> None:
    """Remove the link, if it still leads there."""
    with contextlib.suppress(OSError):
        if os.readlink(link) == address:
            os.unlink(link)


def sweep() -> None:
    """Remove what servers left that did not end by themselves."""
    with contextlib.suppress(OSError), os.scandir(known_folder()) as entries:
        for entry in entries:
            if entry.name.startswith(_NAMES_BEGIN) and not os.path.exists(entry.path):
                withdraw(entry.path, os.readlink(entry.path))
