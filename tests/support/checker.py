"""Prove of a history that nobody was hurt who should not be, and that nobody was missed."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from statistics import median, quantiles

from support.history import FULL_FOR, Block, History, Life, Statement

_GENTLE = (-signal.SIGKILL, -signal.SIGTERM)
_STACKS = signal.SIGRTMAX - 1
"""The signal by which a worker is asked for the stacks of all threads, where that is free."""
# Between the watcher's last look and its signal: who leaves an overdue block just then is not
# saved. It is added to the time in which the machine kept everybody from running.
_RACE = 0.1
# Within so many seconds it mostly does, although a watcher is lost every 1.5 s.
_USUALLY_WITHIN = 1.0
_ENOUGH = 20
_TOLD_WITHIN = 8.0
"""Seconds after which a block that is overdue has been told of, however it ends."""
_WITH_PARENT = 2.0
_MOST_UNWATCHED = 0.2


@dataclass(frozen=True, slots=True)
class Rules:
    """What differs from one kind of history to the next.

    Attributes:
        within: seconds from a deadline to the end of the matter. Evidence takes 2 s, 4 s in a
            crowd, and may be gathered again by each watcher that follows one that died or was
            stopped meanwhile.
        silent_for: seconds that a process may write no record, unless it hangs in a block.
        words: whether the history has all that the watcher said.
    """

    within: float = 15.0
    silent_for: float = inf
    words: bool = True


SOAK = Rules()


class Checker:
    """Judges one history.

    Args:
        history: what happened.
        rules: by what it is judged.
    """

    def __init__(self, history: History, rules: Rules = SOAK) -> None:
        self._history = history
        self._rules = rules
        self._faults = sorted(history.faults, key=lambda fault: fault.at)
        self._lives: defaultdict[int, list[Life]] = defaultdict(list)
        for life in history.lives:
            self._lives[life.pid].append(life)
        self._said: defaultdict[int, list[Statement]] = defaultdict(list)
        for statement in history.statements:
            self._said[statement.pid].append(statement)
        self.lateness: list[float] = []

    def problems(self) -> list[str]:
        """Return every violation of a rule."""
        found = [*self._history.errors, *(f"leaked: {leak}" for leak in self._history.leaks)]
        for life in self._history.lives:
            found += [f"process {life.pid}: {problem}" for problem in life.problems]
            found += self._death(life)
            found += self._raised(life)
            found += self._stood_still(life)
            for block in life.blocks.values():
                found += self._overrun(life, block)
                found += self._repeated(life, block)
        for statement in self._history.statements:
            found += self._untrue(statement)
        found += [
            f"a bystander, {kind}, was killed: it ended with {status}"
            for kind, status in self._history.bystanders
            if status != 0
        ]
        if len(self.lateness) >= _ENOUGH and median(self.lateness) > _USUALLY_WITHIN:
            found.append(f"half of the blocks were ended more than {_USUALLY_WITHIN:g} s late")
        return found

    def idleness(self) -> list[str]:
        """Return what a soak should have seen some of, and has not: it has proven nothing."""
        blocks = [block for life in self._history.lives for block in life.blocks.values()]
        kinds = {fault.kind for fault in self._history.faults}
        unwatched = sum(not block.watched for block in blocks)
        idle = {
            "no watcher was lost": "watcher lost" not in kinds,
            "nobody was killed": not any(map(self.killed, self._history.lives)),
            "nothing was raised": all(block.raised == inf for block in blocks),
            f"{unwatched} of {len(blocks)} blocks were unwatched": unwatched
            >= _MOST_UNWATCHED * len(blocks),
        }
        return [what for what, is_so in idle.items() if is_so]

    def killed(self, life: Life) -> bool:
        """Tell whether the watcher, and nobody else, ended a life by a signal."""
        return life.status in _GENTLE and not life.by_us

    # -- faults

    def _costs(self, since: float, until: float, pid: int = 0) -> float:
        """Return for how long everybody, or `pid`, was kept from running."""
        costs = 0.0
        for fault in self._faults:
            # What happens at the same time costs no more than that.
            if fault.pid in (0, pid) and fault.at + fault.costs > since:
                begin, end = max(fault.at, since), min(fault.at + fault.costs, until)
                costs += max(0.0, end - begin)
                since = max(since, end)
        return costs

    def _bound(self, since: float, patience: float) -> float:
        """Return the seconds after which what is overdue must have been dealt with."""
        bound = self._rules.within + patience
        return bound + self._costs(since, since + bound)

    def _happened(self, kind: str, since: float, until: float) -> bool:
        return any(fault.kind == kind and since <= fault.at <= until for fault in self._faults)

    # -- deaths

    def _death(self, life: Life) -> list[str]:
        """Nobody is killed early, or after having left in time; nobody crashes."""
        who = f"process {life.pid}"
        if life.ended == inf:
            return [f"{who}: nobody knows how it ended"]
        if life.status is None or life.by_us:
            return []
        if life.status == 0:
            return [] if life.finished else [f"{who} ended with 0 in the middle of what it did"]
        race = _RACE + self._costs(life.ended - 1.0, life.ended)
        overdue = [
            block
            for block in life.blocks.values()
            if block.may_be_overdue(life.lived - race, self._over(life, block))
        ]
        if life.status not in _GENTLE:
            # Who is about to be killed, and becomes another program: "Blocks that end just at the
            # deadline" in docs/what-this-does-not-protect.md.
            is_race = life.status == -_STACKS and life.executing < inf and overdue != []
            return [] if is_race else [f"{who} ended with {life.status}"]
        if self._with_its_parent(life):
            return []
        if any(block.on_expiry != "report" for block in overdue):
            return [*self._unexplained(life, overdue), *self._without_grace(life, overdue)]
        if overdue:
            return [f"{who} was killed for {overdue[0].scope}, to be reported only"]
        return [f"{who} was killed at {life.ended:.3f}, and was never overdue then"]

    def _over(self, life: Life, block: Block) -> float:
        """Return when a block was over at the latest: with its program."""
        if life.executing == inf:
            return life.ended
        held_up = self._costs(block.entering, life.executing + 2.0, life.pid)
        return min(life.ended, life.executing + _RACE + held_up)

    def _unexplained(self, life: Life, overdue: list[Block]) -> list[str]:
        """Every kill has its report; on a full disk, an event or a record in the log."""
        if not self._rules.words:
            return []
        since = min(block.first_overdue() for block in overdue)
        scopes = {block.scope for block in overdue}
        said = [
            statement
            for statement in self._said[life.pid]
            if statement.scope in scopes and statement.outcome in ("reaped", "unkillable")
            # What was heard before the next life of that number began.
            if since - _RACE <= statement.at <= life.ended + self._rules.within
        ]
        full = self._happened("full disk", since - 2 * FULL_FOR, life.ended + 2 * FULL_FOR)
        if not said and not (full and any((life.pid, s) in self._history.logged for s in scopes)):
            return [f"process {life.pid} was killed for one of {scopes} without a word"]
        if not full and not any(statement.report for statement in said):
            return [f"process {life.pid} was killed for one of {scopes} without a report"]
        return []

    def _without_grace(self, life: Life, overdue: list[Block]) -> list[str]:
        """Who has asked for a grace has it before SIGKILL."""
        if life.status != -signal.SIGKILL:
            return []
        earliest = min(block.first_overdue() + block.grace for block in overdue)
        if life.ended >= earliest:
            return []
        return [f"process {life.pid} was killed {earliest - life.ended:.3f} s within its grace"]

    def _with_its_parent(self, life: Life) -> bool:
        """A child that was no worker, or not yet one again, dies with the worker that forked it."""
        is_worker = life.watched and life.executing == inf
        return not is_worker and any(
            self.killed(parent) and self._together(parent, life)
            for parent in self._history.lives
            if life.pid in parent.forked
        )

    def _together(self, one: Life, other: Life) -> bool:
        """Tell whether two lives ended about the same time."""
        first, last = sorted((one.ended, other.ended))
        return last - first <= _WITH_PARENT + self._costs(first, last)

    def _stood_still(self, life: Life) -> list[str]:
        """Nobody is kept waiting by another one's death."""
        silences = [(*life.silent, "its next record")]
        hangs = any(block.entered < inf == block.ended for block in life.blocks.values())
        if life.ended < inf and not hangs:
            silences.append((life.last, min(life.ended, life.executing), "its end was seen"))
        return [
            f"process {life.pid} stood still for {until - since:.1f} s: "
            f"from {since - life.started:.3f} s after its start until {what}"
            for since, until, what in silences
            if until - since > self._rules.silent_for + self._costs(since, until)
        ]

    # -- blocks

    def _raised(self, life: Life) -> list[str]:
        """`TimerExpired` comes inside of a block that is overdue and wants it."""
        return [
            f"process {life.pid}: TimerExpired in {block.scope}, which was not overdue"
            for block in life.blocks.values()
            if block.raised < inf
            and (block.on_expiry != "raise" or not block.may_be_overdue(block.raised, block.raised))
        ]

    def _overrun(self, life: Life, block: Block) -> list[str]:
        """What is overdue comes to an end, or has a stated reason, within its bound."""
        if not block.watched:
            return []
        who = f"process {life.pid}: {block.scope}"
        for since, until in block.surely:
            until = min(until, self._over(life, block))
            bound = self._bound(since, block.patience)
            told = min(
                (said.at for said in self._about(life, block) if said.at >= since - _RACE),
                default=inf,
            )
            # Of what is only to be reported, the word is the end of the matter.
            done = min(until, told) if block.on_expiry == "report" else until
            if done - since > bound:
                how = "never" if done == inf else f"{done - since:.1f} s late"
                return [f"{who} was ended {how}, bound {bound:.1f} s"]
            tellable = _TOLD_WITHIN + bound - self._rules.within
            silent = told == inf and self._rules.words
            if until - since > tellable and silent and not life.by_us:
                return [f"{who} was overdue for {until - since:.1f} s, and never told of"]
            if self.killed(life) and until == life.ended:
                self.lateness.append(life.ended - since - block.patience)
        return []

    def _about(self, life: Life, block: Block) -> Iterator[Statement]:
        """Yield what may have been said about a block, in time."""
        for said in self._said[life.pid]:
            if said.scope == block.scope and any(
                begin <= min(said.at, self._over(life, block))
                and said.at <= min(end, life.ended) + self._bound(begin, block.patience)
                for begin, end in block.perhaps
            ):
                yield said

    # -- statements

    def _untrue(self, statement: Statement) -> list[str]:
        """Every statement belongs to a real expiry, and who is said to be dead is dead."""
        what = (
            f"{statement.outcome} of {statement.scope!r} in process {statement.pid} "
            f"at {statement.at:.3f}"
        )
        meant = [
            life
            for life in self._lives[statement.pid]
            for block in life.blocks.values()
            if statement in self._about(life, block)
        ]
        if not meant:
            return [f"{what} belongs to no expiry"]
        # Who waits for a child sees its end late if it is kept from running.
        lived = min(life.lived - self._costs(statement.at, life.lived, life.pid) for life in meant)
        if statement.outcome == "reaped" and lived > statement.at:
            return [f"{what}, which lived on"]
        return []

    def _repeated(self, life: Life, block: Block) -> list[str]:
        """A block's expiry and its end are told once, by an event and by a report.

        Only a watcher that follows one that was lost just then may tell it again.
        """
        namesakes = [
            other
            for one in self._lives[life.pid]
            for other in one.blocks.values()
            if other.scope == block.scope
        ]
        if len(namesakes) > 1 or len(block.perhaps) > 1:
            return []
        told = list(self._about(life, block))
        ends = [said for said in told if said.outcome != "expired"]
        reports = sum(said.report for said in ends)
        most = max(reports, len(ends) - reports, len(told) - len(ends))
        times = [said.at for said in told]
        # It may be heard a moment after the loss of who told it.
        if most <= 1 or self._happened("watcher lost", min(times) - 1.0, max(times) + 1.0):
            return []
        return [f"process {life.pid}: {block.scope} was told of {most} times"]


def _lateness(found: list[float]) -> str:
    if len(found) < 2:
        return "none"
    hundredths = quantiles(found, n=100, method="inclusive")
    return (
        f"{median(found):.2f} s in the median, {hundredths[98]:.2f} s but for 1 %, "
        f"{max(found):.2f} s at worst"
    )


def summary(history: History, checker: Checker, problems: list[str]) -> str:
    """Say in a few lines what happened."""
    lives = history.lives
    timers = sum(life.quick + len(life.blocks) for life in lives)
    kinds: defaultdict[str, int] = defaultdict(int)
    for fault in history.faults:
        kinds[fault.kind] += 1
    killed = sum(checker.killed(life) for life in lives)
    raised = sum(block.raised < inf for life in lives for block in life.blocks.values())
    false = sum("was killed" in problem for problem in problems)
    missed = sum(" was ended " in problem or "never told" in problem for problem in problems)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"{len(lives):,} workers, {timers:,} timers, {killed} killed by the watcher, "
        f"{raised} raised, {kinds['watcher lost']} watchers lost\n"
        f"false kills: {false}; missed: {missed}; leaks: {len(history.leaks)}; "
        f"lateness: {_lateness(checker.lateness)}\n"
        f"faults: {faults or 'none'}\n"
        f"problems: {len(problems)}"
    )
