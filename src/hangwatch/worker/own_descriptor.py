"""Descriptors of ours in a process that is not."""

from __future__ import annotations

import os


class OwnDescriptor:
    """A descriptor that this process opened, told from one that has its number now.

    A program that closes all descriptors it does not know closes ours, too.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        status = os.fstat(number)
        self._inode = status.st_dev, status.st_ino

    def is_ours(self) -> bool:
        """Tell whether the number still stands for the file that it was opened as."""
        try:
            status = os.fstat(self.number)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def close(self) -> None:
        """Close it, if it is still ours."""
        if self.is_ours():
            os.close(self.number)

    def __del__(self) -> None:
        self.close()
