"""Prove of a history that nobody was hurt who should not be, and that nobody was missed."""

from __future__ import annotations

import signal
from bisect import bisect_left
from collections import defaultdict
from math import inf

from soak.history import Block, History, Life, Statement

_GENTLE = (-signal.SIGKILL, -signal.SIGTERM)
# Between the watcher's last look and its signal, and between a death and our seeing it, a
# busy machine may take a while: who leaves an overdue block just then is not saved.
_RACE = 1.0
WITHIN = 15.0
"""Seconds from a deadline to the end of the matter: evidence takes 2 s, 4 s in a crowd, and
may be gathered again by each watcher that follows one that died or was stopped meanwhile."""
_CONNECTS_WITHIN = 0.5


class Checker:
    """Judges one history.

    Args:
        history: what happened.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._faults = sorted(history.faults, key=lambda fault: fault.at)
        self._fault_times = [fault.at for fault in self._faults]
        self._dearest = max((fault.costs for fault in self._faults), default=0.0)
        self._said: defaultdict[int, list[Statement]] = defaultdict(list)
        for statement in history.statements:
            self._said[statement.pid].append(statement)
        self.worst_lateness = 0.0

    def problems(self) -> list[str]:
        """Return every violation of a rule."""
        found = [*self._history.errors, *(f"leaked: {leak}" for leak in self._history.leaks)]
        for life in self._history.lives:
            found += [f"process {life.pid}: {problem}" for problem in life.problems]
            found += self._death(life)
            found += self._raised(life)
            for block in life.blocks.values():
                found += self._overrun(life, block)
        for statement in self._history.statements:
            found += self._groundless(statement)
        return found

    def killed(self, life: Life) -> bool:
        """Tell whether the watcher, and nobody else, ended a life by a signal."""
        return life.status in _GENTLE and not life.by_us

    def _death(self, life: Life) -> list[str]:
        """Nobody is killed early, or after having left in time; nobody crashes."""
        if life.status is None or life.by_us:
            return []
        if life.status not in _GENTLE:
            return [f"process {life.pid} ended with {life.status}"] if life.status else []
        overdue = [
            block for block in life.blocks.values() if block.may_be_overdue(life.ended, _RACE)
        ]
        if any(block.on_expiry != "report" for block in overdue):
            return self._unexplained(life, overdue)
        if self._with_its_parent(life):
            return []
        if overdue:
            return [f"process {life.pid} was killed for {overdue[0].scope}, to be reported only"]
        return [f"process {life.pid} was killed at {life.ended:.3f}, and was never overdue then"]

    def _unexplained(self, life: Life, overdue: list[Block]) -> list[str]:
        """Every kill has its report."""
        scopes = {block.scope for block in overdue}
        if any(said.scope in scopes for said in self._said[life.pid]):
            return []
        return [f"process {life.pid} was killed for one of {scopes} without a word"]

    def _with_its_parent(self, life: Life) -> bool:
        """A child that has not armed anything yet dies with the worker that forked it."""
        watched = [block.entered for block in life.blocks.values() if block.watched]
        return life.child and min(watched, default=inf) > life.ended - _CONNECTS_WITHIN

    def _raised(self, life: Life) -> list[str]:
        """`TimerExpired` comes inside of a block that is overdue and wants it."""
        return [
            f"process {life.pid}: TimerExpired in {block.scope}, which was not overdue"
            for block in life.blocks.values()
            if block.raised < inf
            and (block.on_expiry != "raise" or not block.may_be_overdue(block.raised))
        ]

    def _overrun(self, life: Life, block: Block) -> list[str]:
        """What is overdue comes to an end, or has a stated reason, within its bound."""
        if not block.watched:
            return []
        for since, until in block.surely:
            until = min(until, life.ended)
            bound = self._bound(since, block.patience)
            said = self._first_word(life, block, since)
            done = min(until, said)
            if done - since > bound:
                how = "never" if done == inf else f"{done - since:.1f} s late"
                return [f"process {life.pid}: {block.scope} was ended {how}, bound {bound:.1f} s"]
            if self.killed(life) and until == life.ended:
                lateness = life.ended - since - block.patience
                self.worst_lateness = max(self.worst_lateness, lateness)
        return []

    def _first_word(self, life: Life, block: Block, since: float) -> float:
        """Return when it was first said that the block had overrun, if that ended the matter."""
        if block.on_expiry != "report":
            return inf
        times = [said.at for said in self._said[life.pid] if said.scope == block.scope]
        return min((at for at in times if at >= since - _RACE), default=inf)

    def _bound(self, since: float, patience: float) -> float:
        """Return the seconds after which what is overdue must have been dealt with."""
        bound = WITHIN + patience
        index = bisect_left(self._fault_times, since - self._dearest)
        for fault in self._faults[index:]:
            if fault.at > since + bound:
                break
            if fault.at + fault.costs > since:
                bound += fault.costs
        return bound

    def _groundless(self, statement: Statement) -> list[str]:
        """Every report belongs to a real expiry."""
        mine = [life for life in self._history.lives if life.pid == statement.pid]
        blocks = [b for life in mine for b in life.blocks.values() if b.scope == statement.scope]
        if any(begin <= statement.at for block in blocks for begin, _ in block.perhaps):
            return []
        what = f"{statement.outcome} of {statement.scope!r} in process {statement.pid}"
        return [f"{what} at {statement.at:.3f} belongs to no expiry"]


def summary(history: History, checker: Checker, problems: list[str]) -> str:
    """Say in a few lines what happened."""
    lives = history.lives
    timers = sum(life.quick + len(life.blocks) for life in lives)
    kinds: defaultdict[str, int] = defaultdict(int)
    for fault in history.faults:
        kinds[fault.kind] += 1
    killed = sum(checker.killed(life) for life in lives)
    raised = sum(block.raised < inf for life in lives for block in life.blocks.values())
    false = sum("was never overdue" in problem for problem in problems)
    missed = sum(" was ended " in problem for problem in problems)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"{len(lives):,} workers, {timers:,} timers, {killed} killed by the watcher, "
        f"{raised} raised, {kinds['watcher lost']} watchers lost\n"
        f"false kills: {false}; missed: {missed}; leaks: {len(history.leaks)}; "
        f"worst lateness: {checker.worst_lateness:.2f} s\n"
        f"faults: {faults or 'none'}\n"
        f"problems: {len(problems)}"
    )
