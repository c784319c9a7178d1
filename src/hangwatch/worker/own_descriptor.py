"""Descriptors of ours in a process that is not."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable


def file_of(number: int) -> tuple[int, int] | None:
    """Return the device and inode that a descriptor stands for; None: it is not open."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class OwnDescriptor:
    """A descriptor that this process opened, told from one that has its number now.

    A program that closes all descriptors it does not know closes ours, too.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._file = file_of(number)

    def is_ours(self) -> bool:
        """Tell whether the number still stands for the file that it was opened as."""
        return self._file is not None and file_of(self.number) == self._file

    def close(self) -> None:
        """Close it, if it is still ours."""
        if self.is_ours():
            os.close(self.number)

    def __del__(self) -> None:
        self.close()


_kept: list[object] = []


class OwnMemory(mmap.mmap):
    """A file of ours, mapped.

    mmap has a duplicate of the descriptor, and closes its number at the end, whatever that stands
    for by then. Unless it is still ours, the memory is kept for good.
    """

    _duplicate: int
    _file: tuple[int, int] | None

    def __new__(cls, number: int, length: int) -> OwnMemory:
        """Map a descriptor's file."""
        lowest = os.dup(number)
        os.close(lowest)
        self = super().__new__(cls, number, length)
        # If another thread has taken the lowest number meanwhile, that is not our file.
        self._duplicate, self._file = lowest, file_of(number)
        return self

    def __del__(
        self,
        file_of: Callable[[int], object] = file_of,
        keep: Callable[[object], None] = _kept.append,
    ) -> None:
        try:
            is_ours = file_of(self._duplicate) == self._file
        except Exception:  # at the interpreter's end nothing can be found out any more
            is_ours = False
        if not is_ours:
            keep(self)
