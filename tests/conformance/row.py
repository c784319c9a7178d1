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
OURS = "hangwatch"
TORCH = "torch.distributed.elastic.timer"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scenario came out.

    Attributes:
        holds: whether the promise was kept.
        figure: what was measured, in a few words.
    """

    holds: bool
    figure: str


Scenario = Callable[["Stage"], Outcome]


@dataclass(frozen=True, slots=True)
class Row:
    """One promise, and the scenario that shows whether it is kept.

    Attributes:
        id: its name.
        promise: what is promised, in one sentence.
        scenario: plays it and says how it came out.
        pairs: the pairs for which it makes sense.
        alone: whether it aims signals, or pids, at others: it gets a pid namespace.
        by_chance: whether who breaks the promise breaks it only in some plays.
    """

    id: str
    promise: str
    scenario: Scenario
    pairs: tuple[str, ...] = BOTH
    alone: bool = False
    by_chance: bool = False


ROWS: list[Row] = []
"""All of them, as soon as their modules are imported."""


def promise(
    text: str, *pairs: str, alone: bool = False, by_chance: bool = False
) -> Callable[[Scenario], Scenario]:
    """Make a row of a scenario, of which the row has the name.

    Args:
        text: what is promised.
        pairs: the pairs for which it makes sense; both by default.
        alone, by_chance: see `Row`.
    """

    def keep(scenario: Scenario) -> Scenario:
        row_id = scenario.__name__.replace("_", "-")
        ROWS.append(Row(row_id, text, scenario, pairs or BOTH, alone, by_chance))
        return scenario

    return keep


def death(after_s: float | None, within: float) -> str:
    """Say when a process was killed, or for how long it was seen alive."""
    return f"still alive after {within:g} s" if after_s is None else f"killed after {after_s:.1f} s"
