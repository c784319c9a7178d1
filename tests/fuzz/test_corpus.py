"""Every input that was kept, and some hundreds made of them; `make fuzz` makes more."""

from __future__ import annotations

import random
import zlib
from functools import partial

import pytest

from fuzz import bounds
from fuzz.mutation import mutate
from fuzz.targets import TARGETS, Target
from hangwatch.evidence import faulthandler_text, stacks
from support.sizes import Size, short_and_long


@pytest.fixture(params=list(TARGETS.values()), ids=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


def test_what_is_kept_passes_in_time_and_memory(target: Target) -> None:
    for path in target.kept():
        data = path.read_bytes()
        try:
            bounds.in_memory(partial(bounds.in_time, target.check), data)
        except Exception as error:
            error.add_note(f"the input: {path}")
            raise


def test_a_dump_as_large_as_is_read_costs_little() -> None:
    """How large the memfd is was the worker's choice."""

    def parse(data: bytes) -> None:
        faulthandler_text.parse(data.decode("utf-8", "replace"))

    for path in TARGETS["dump"].seeds():
        data = path.read_bytes()
        large = data * (stacks._MOST_BYTES // len(data))
        bounds.in_memory(partial(bounds.in_time, parse), large)


def test_a_line_without_end_is_not_kept() -> None:
    bounds.in_memory(TARGETS["fifo"].check, b"x" * (1 << 20))


@short_and_long
def test_what_is_made_of_it_passes(target: Target, size: Size) -> None:
    rng = random.Random(zlib.crc32(target.name.encode()))
    seeds = [path.read_bytes() for path in target.seeds()]
    for _ in range(size.of(75, 150, 1500)):
        data = mutate(rng.choice(seeds), rng, target.tokens, target.most)
        try:
            bounds.in_time(target.check, data)
        except Exception as error:
            error.add_note(f"the input: {data!r}")
            raise
