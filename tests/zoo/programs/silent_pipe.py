"""A read from a pipe that nobody writes."""

import os

import hangwatch

read_end, write_end = os.pipe()


def stuck_here() -> None:
    os.read(read_end, 1)


with hangwatch.expires(after=0.4, scope="pipe"):
    stuck_here()
