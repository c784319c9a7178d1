"""A verdict, and what an incident that follows from it needs of the watcher around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hangwatch.evidence.model import Case, OtherWorker
from hangwatch.policy import Policy
from hangwatch.watcher.fair_clock import FairClock
from hangwatch.watcher.helper import Helper
from hangwatch.watcher.page_reader import Overdue
from hangwatch.watcher.settings import Settings
from hangwatch.watcher.watched import Watched


class Surroundings(Protocol):
    """What an incident needs of the watcher around it."""

    settings: Settings
    clock: FairClock

    def look(self, worker: Watched, found: Overdue) -> str | None:
        """Say what makes a verdict void by now; None: it still holds."""

    def start_helper(
        self, work: Callable[[], bytes], keep: list[int], outlives: bool = False
    ) -> Helper:
        """Run work in a process of its own."""

    def gathering(self) -> int:
        """Count the incidents whose evidence is being gathered."""

    def publishing(self) -> int:
        """Count the incidents whose report is being written."""

    def paused(self) -> bool:
        """Tell whether watching is paused."""

    def spared(self, worker: Watched) -> set[int]:
        """Return the processes that no kill of this worker may reach."""

    def keep_in_mind(self, worker: Watched) -> None:
        """Let a successor know what we know of a worker."""

    def tell(self, event: str, verdict: Verdict, headline: str) -> None:
        """Tell the program that launched the watcher."""

    def others(self, worker: Watched) -> list[OtherWorker]:
        """Say what the other workers are doing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A block that overran: whose, which, when it was found (CLOCK_MONOTONIC), what is known.

    Attributes:
        policy: what it leads to.
        chosen: what the block itself chose of that.
        told: whether it was reported before, as one under a debugger.
    """

    worker: Watched
    found: Overdue
    at: float
    case: Case
    names: dict[int, str]
    policy: Policy
    chosen: Policy
    told: bool = False
