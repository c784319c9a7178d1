"""Every input that was kept, and some hundreds made of them; `make fuzz` makes more."""

from __future__ import annotations

import random
import zlib
from functools import partial
from pathlib import Path

import pytest

from fuzz import bounds
from fuzz.mutation import mutate
from fuzz.targets import TARGETS, Target
from hangwatch.evidence import faulthandler_text, stacks

KEPT = [(target, path) for target in TARGETS.values() for path in target.kept()]


@pytest.fixture(params=list(TARGETS.values()), ids=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


@pytest.mark.parametrize(
    ("target", "path"), KEPT, ids=[f"{target.name}-{path.name}" for target, path in KEPT]
)
def test_what_is_kept_passes(target: Target, path: Path) -> None:
    bounds.in_time(target.check, path.read_bytes())


def test_what_is_kept_takes_little_memory(target: Target) -> None:
    for path in target.kept():
        bounds.in_memory(target.check, path.read_bytes())


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


def test_what_is_made_of_it_passes(target: Target) -> None:
    rng = random.Random(zlib.crc32(target.name.encode()))
    seeds = [path.read_bytes() for path in target.seeds()]
    for _ in range(150):
        data = mutate(rng.choice(seeds), rng, target.tokens, target.most)
        try:
            bounds.in_time(target.check, data)
        except Exception as error:
            error.add_note(f"the input: {data!r}")
            raise
