"""An exception at any place of a block leaves nothing armed, once it is handled and gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hangwatch.worker.chosen_core import core
from support.sizes import Size, short_and_long
from support.storm import KINDS

pytestmark = [pytest.mark.core, pytest.mark.timeout(1200)]


@short_and_long
@pytest.mark.parametrize("kind", KINDS)
def test_a_storm_of_exceptions_leaves_nothing_armed(kind: str, size: Size) -> None:
    # In plain Python, events are many times as many, and slots get lost, see below.
    hits = size.of(1_500, 10_000, 10_000 if is_pure() else 100_000)
    path = os.pathsep.join(sys.path)
    # Python warns of coroutines that an exception keeps from being awaited.
    quiet = ("-W", "ignore:coroutine:RuntimeWarning")
    result = subprocess.run(
        [sys.executable, *quiet, "-m", "support.storm", kind, str(hits)],
        env={**os.environ, "PYTHONPATH": path, "HANGWATCH_PURE": str(int(is_pure()))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    print(result.stdout)
    count = json.loads(result.stdout)
    assert count["hits"] >= hits
    assert count["stuck"] == {}
    if is_pure():
        # An interruption can keep a slot from being used again: see `core`.
        assert count["in_use"] < 100 + count["hits"] / 2
    else:
        assert count["watched"]
        assert count["in_use"] < 64


def is_pure() -> bool:
    return core.__name__ == "hangwatch.worker.core"
