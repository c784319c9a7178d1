"""What the processes of a kill storm show each other: one page of shared memory, no lock.

Whoever is killed in the midst of a store leaves the old number or the new one there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from hangwatch import linux

SURVIVORS = 4
FORKERS = 2
AT_ONCE = 4
"""So many victims each forker has alive."""


class Order(IntEnum):
    """What a survivor is told to do."""

    GO_ON = 0
    HANG = 1
    END = 2


class Phase(IntEnum):
    """Where a victim is, and so where it died."""

    STARTS = 0
    FIRST = 1
    ENTERS = 2
    INSIDE = 3
    LEAVES = 4


class Survivor(ctypes.Structure):
    """A long-lived worker, or one that only hangs; times are CLOCK_MONOTONIC.

    Attributes:
        order: what it shall do.
        blocks: how many blocks it has left.
        beat: when it last got on.
        longest: the longest time in which it did not.
        deadline: when the block that it hangs in expires; 0 before that.
    """

    order: int
    blocks: int
    beat: float
    longest: float
    deadline: float
    _fields_ = (
        ("order", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("beat", ctypes.c_double),
        ("longest", ctypes.c_double),
        ("deadline", ctypes.c_double),
    )

    def clear(self, order: Order) -> None:
        """Make it the place of a new worker."""
        self.order, self.deadline, self.longest = order, 0.0, 0.0
        self.beat = time.monotonic()

    def gets_on(self) -> None:
        """Note, in the worker, that nothing blocks it."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.beat)
        self.beat = now


class Forker(ctypes.Structure):
    """A process that forks victims and kills them.

    Attributes:
        kills: how many it has killed.
        ended: how many the server has, since they overran a block.
        phases: where each of its living victims is.
        died: how many it has killed in each phase.
    """

    kills: int
    ended: int
    phases: ctypes.Array[ctypes.c_int64]
    died: ctypes.Array[ctypes.c_int64]
    _fields_ = (
        ("kills", ctypes.c_int64),
        ("ended", ctypes.c_int64),
        ("phases", ctypes.c_int64 * AT_ONCE),
        ("died", ctypes.c_int64 * len(Phase)),
    )


class Board(ctypes.Structure):
    """The whole page.

    Attributes:
        stop: not 0 when the storm shall end: something is wrong.
        survivors: the long-lived workers, and at last the fresh one that hangs.
        forkers: those who kill.
    """

    stop: int
    survivors: ctypes.Array[Survivor]
    forkers: ctypes.Array[Forker]
    _fields_ = (
        ("stop", ctypes.c_int64),
        ("survivors", Survivor * (SURVIVORS + 1)),
        ("forkers", Forker * FORKERS),
    )

    @property
    def kills(self) -> int:
        """How many victims were killed."""
        return sum(forker.kills for forker in self.forkers)


def new_board() -> Board:
    """Make a board that every process forked from here on shares."""
    return Board.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))


class Problems:
    """A file to which any process of the storm adds what is wrong; that ends the storm."""

    def __init__(self, path: Path, board: Board) -> None:
        self._path = path
        self._board = board

    def add(self, text: str) -> None:
        """Say what is wrong, in one line."""
        # One small write at the end of the file: no two of them mix.
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, f"{text}\n".encode())
        os.close(file)
        self._board.stop = 1

    def all(self) -> list[str]:
        """Return what was said."""
        return self._path.read_text().splitlines() if self._path.exists() else []


class Gate:
    """A gate that one process opens for so many others; made before any of them is forked."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def open(self, count: int = 1) -> None:
        """Let `count` processes through."""
        os.write(self._write, b"." * count)

    def wait(self) -> None:
        """Wait to be let through."""
        os.read(self._read, 1)


def fork(body: Callable[[], None]) -> int:
    """Fork a process that does something and ends, at the latest with its parent."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        linux.die_with(parent)
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
