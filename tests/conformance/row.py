"""What a row of the conformance table is, and how its scenario came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.stage import Stage

LOCAL = "local"
"""The pair over a multiprocessing queue."""
FILE = "file"
"""The pair over a FIFO."""
BOTH = (LOCAL, FILE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scenario came out.

    Attributes:
        holds: whether the promise was kept.
        figure: what was measured, in a few words.
    """

    holds: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Row:
    """One promise, and the scenario that shows whether it is kept.

    Attributes:
        id: its name.
        promise: what is promised, in one sentence.
        scenario: plays it and says how it came out.
        pairs: the pairs for which it makes sense.
        alone: whether it aims signals, or pids, at others: it gets a pid namespace.
    """

    id: str
    promise: str
    scenario: Callable[[Stage], Outcome]
    pairs: tuple[str, ...] = BOTH
    alone: bool = False


def death(after_s: float | None, within: float) -> str:
    """Say when a process was killed, or for how long it was seen alive."""
    return f"still alive after {within:g} s" if after_s is None else f"killed after {after_s:.1f} s"
