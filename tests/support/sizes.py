"""A short size of a test for `make test`, a longer one of the same for `make test-all`."""

from __future__ import annotations

import enum
from typing import TypeVar

import pytest

T = TypeVar("T")


class Size(enum.Enum):
    """How much a test does: in `make test`, in `make test-all SHORT=1`, in `make test-all`."""

    SHORT = enum.auto()
    MIDDLE = enum.auto()
    FULL = enum.auto()

    def of(self, short: T, middle: T, full: T) -> T:
        """Return what a test of this size takes."""
        return {Size.SHORT: short, Size.MIDDLE: middle, Size.FULL: full}[self]


LONG = pytest.param("long", marks=pytest.mark.long)
"""The parameter of the fixture `size` for what only `make test-all` runs."""

short_and_long = pytest.mark.parametrize("size", ["short", LONG], indirect=True)
"""Run a test in a short size, and in a long one that is marked `long`."""
