"""One worker of `hangwatch demo`: takes a number, adds to it, passes it on."""

from __future__ import annotations

import ctypes
import os
import sys

import hangwatch

WORK_LIMIT = 1.0
STEPS = 200
HANGS_AT = 50


def stop_in_c() -> None:
    """Read from a pipe that nobody writes, in C, with the GIL held."""
    read_end, _write_end = os.pipe()
    ctypes.PyDLL(None).read(read_end, ctypes.create_string_buffer(1), 1)


def work(step: int, number: int, hangs: bool) -> int:
    """Add one, or stop for ever."""
    with hangwatch.expires(after=WORK_LIMIT, scope="work"):
        if hangs and step == HANGS_AT:
            stop_in_c()
        return number + 1


def main() -> None:
    """Work until the ring breaks."""
    source, sink = int(sys.argv[1]), int(sys.argv[2])
    hangs = "--hang" in sys.argv
    number = 0
    for step in range(STEPS):
        try:
            os.write(sink, work(step, number, hangs).to_bytes(8, "little"))
            with hangwatch.expires(after=30, scope="receive"):
                received = os.read(source, 8)
        except BrokenPipeError:
            return
        if not received:  # the neighbour has gone: nobody to work with
            return
        number = int.from_bytes(received, "little")


if __name__ == "__main__":
    main()
