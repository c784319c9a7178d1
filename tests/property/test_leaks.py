"""Blocks leave nothing behind: neither memory nor objects."""

from __future__ import annotations

import contextlib
import gc
import itertools
import resource
import sys
from collections.abc import Callable, Iterator

import pytest

import hangwatch
from support.pages import quiet_page
from support.sizes import Size, short_and_long

pytestmark = pytest.mark.core

_EACH = 500
"""Blocks of a pattern in one go."""


def plain() -> None:
    with hangwatch.expires(60, "plain"), hangwatch.expires(after=60):
        pass


def renewed() -> None:
    with hangwatch.expires(60, "renewed") as block:
        block.renew()
        block.renew(5)


def forgotten() -> None:
    hangwatch.expires(60, "forgotten").__enter__()


def never_entered() -> None:
    hangwatch.expires(60, "never entered")


def refused() -> None:
    for arguments in ((0,), ("60",), (60, "")):
        with contextlib.suppress(ValueError, TypeError):
            hangwatch.expires(*arguments)
    block = hangwatch.expires(60, "refused")
    with block, contextlib.suppress(hangwatch.HangwatchError):
        block.__enter__()


def chosen() -> None:
    with hangwatch.expires(60, "chosen", on_expiry="report", grace=1.5):
        pass
    with hangwatch.paused("pause", 60):
        pass


def generated() -> Iterator[None]:
    with hangwatch.expires(60, "generated"):
        yield


def left_half_way() -> None:
    next(generated())


def failed() -> None:
    with contextlib.suppress(KeyError), hangwatch.expires(60, "failed"):
        raise KeyError


def new_each_time() -> None:
    with hangwatch.expires(60, f"scope {next(_numbers)}"):
        pass


_numbers = itertools.count()
PATTERNS: tuple[Callable[[], None], ...] = (
    plain,
    renewed,
    forgotten,
    never_entered,
    refused,
    chosen,
    left_half_way,
    failed,
    new_each_time,
)


def in_use() -> tuple[int, int]:
    """Return the blocks of Python's allocator, and the peak of our memory in KiB."""
    gc.collect()
    return sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@short_and_long
def test_blocks_leave_no_memory_behind(size: Size) -> None:
    blocks = size.of(40_000, 100_000, 1_000_000)

    def run(count: int) -> None:
        for _ in range(count // (_EACH * len(PATTERNS)) + 1):
            for pattern in PATTERNS:
                for _ in range(_EACH):
                    pattern()

    with quiet_page():
        run(20_000)
        objects, memory = in_use()
        run(blocks)
        more_objects, more_memory = in_use()
    assert more_objects - objects < 500
    assert more_memory - memory < 4096
