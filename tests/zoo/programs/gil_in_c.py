"""A C call that holds the GIL and that no signal ends."""

import ctypes
import os

import hangwatch


def stuck_here() -> None:
    read_end, _write_end = os.pipe()
    ctypes.PyDLL(None).read(read_end, ctypes.create_string_buffer(1), 1)


with hangwatch.expires(after=0.4, scope="gil in c"):
    stuck_here()
