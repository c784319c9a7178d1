"""The checker finds what is planted, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import re
from math import inf
from typing import Any

import pytest

from support.checker import SOAK, Checker, Rules
from support.history import Death, Fault, History, Life, Statement, bury, life_of

PID = 7
STORM = Rules(within=5.0, silent_for=5.0, words=False)

# A history a line, and what is found in it, if anything. Events have a time in seconds each:
#   in SCOPE LIMIT [...]     enters a block at once, watched; `in#2` is block number 2
#   out                      leaves it at once
#   dies STATUS [by us]      `dies None` is an exec; `looked` is when it was last seen alive
#   told SCOPE OUTCOME       by an event, and by a report if it is an end
#   said, reported           by one of them
#   fault COSTS KIND         `worker` is this one, `another` is not
# All others are records of the process's log. What is killed at 11.1 is killed in time; 15 s is
# the bound, so that 26.5 is too late, and 31 is if 4 s of it are not counted.
FINE = """
killed and explained: 10 in a 1, 11.1 told a reaped, 11.1 dies -9
left in time: 10 in a 1, 10.5 out, 12 end, 13 dies 0
a close race: 10 in a 1, 11.5 leaving, 11.6 left, 11.65 told a reaped, 11.65 dies -9
left late on a slow machine: 10 in a 1, 11.3 fault 0.5 machine stood still, 11.5 leaving,
    11.6 left, 12 told a reaped, 12 dies -9
a death at any time since the look before: 10 in a 1, 11.5 leaving, 11.6 left, 12 dies -9,
    11.5 looked, 11.7 told a reaped
renewed and overdue again: 10 in a 1, 10.9 renewing, 10.95 renewed 1, 12 told a reaped, 12 dies -9
by the old deadline in the midst of a renewal: 10 in a 1, 10.9 renewing, 11.1 told a reaped,
    11.1 dies -9
the first signal within a grace: 10 in a 1 grace=0.5 patience=1, 11.1 told a reaped, 11.1 dies -15
after a grace: 10 in a 1 grace=0.5 patience=1, 11.6 told a reaped, 11.6 dies -9
left within a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 b 0.5, 12.5 left#3,
    20 dies 0 by us
cancelled within a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 b 0.5, 12.5 cancelled#3,
    20 dies 0 by us
after a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 15 out#2, 15.6 told a reaped, 15.6 dies -9
after two pauses: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 inner 60 pauses, 14 out#3,
    15 out#2, 15.6 told a reaped, 15.6 dies -9
a pause that overruns: 10 in pause 0.5 pauses, 10.6 told pause reaped, 10.6 dies -9
no report on a full disk: 10 in a 1, 10 fault 0 full disk, 11.1 said a reaped, 11.1 dies -9
no word but in the log on a full disk: 10 in a 1, 10 fault 0 full disk, 11.1 logged a, 11.1 dies -9
killed by us: 10 in a 1, 10.5 dies -9 by us
another program was asked for stacks: 10 in a 1, 10.95 executing, 11.04 dies -63
late for a standstill: 10 in a 1, 12 fault 0.8 machine stood still, 26.5 told a reaped, 26.5 dies -9
late for one just before: 10 in a 1, 10.7 fault 0.9 machine stood still, 26.5 told a reaped,
    26.5 dies -9
late for all of them: 10 in a 1, 12 fault 3 machine stood still, 13 fault 3 8 busy processes,
    20 fault 2 machine stood still, 12 told a expired, 31 told a reaped, 31 dies -9
late by its grace: 10 in a 1 patience=1, 26.5 told a reaped, 26.5 dies -9
nobody could watch it: 10 in a 1 unwatched, 90 dies -9 by us
reported only: 10 in a 1 report, 11.5 told a reported, 90 dies -9 by us
overdue for long and told of: 10 in a 1, 21 left, 21 told a recovered, 22 end, 23 dies 0
only to be reported and told of: 10 in a 1 report, 21 left, 21 told a recovered, 22 end, 23 dies 0
raised: 10 in a 1 raise, 11.2 raised, 11.2 told a raised, 13 left, 14 end, 15 dies 0
told again by the next watcher: 10 in a 1, 11.1 told a expired, 11.5 fault 0 watcher lost,
    11.8 told a expired, 12.1 told a reaped, 12.1 dies -9
stopped on its way to another program: 10 in a 1, 10.1 executing, 10.1 fault 1 worker stopped,
    11.5 told a reaped, 11.5 dies -9
"""
FOUND = """
too early: 10 in a 1, 10.9 dies -9 -> never overdue
outside of every block: 5 dies -9 -> never overdue
left in time: 10 in a 1, 10.5 leaving, 10.6 left, 11.5 dies -9 -> never overdue
left late and killed later: 10 in a 1, 11.5 leaving, 11.6 left, 11.2 said a expired,
    12 dies -9 -> never overdue then
renewed: 10 in a 1, 10.9 renewing, 10.95 renewed 1, 11.5 dies -9 -> never overdue
cancelled: 10 in a 1, 10.5 cancelled, 11.5 dies -9 -> never overdue
in a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 12 dies -9 -> never overdue
left within a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 b 0.5, 12.5 left#3,
    12.4 dies -9 -> never overdue
cancelled within a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 b 0.5, 12.5 cancelled#3,
    12.4 dies -9 -> never overdue
told of within a pause: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 b 0.5, 12.5 left#3,
    12 said b recovered, 20 dies 0 by us -> belongs to no expiry
a pause gives its time back: 10 in a 1, 10.5 in#2 pause 60 pauses, 15 out#2,
    15.4 dies -9 -> never overdue
an inner pause gives none back: 10 in a 1, 10.5 in#2 pause 60 pauses, 11 in#3 inner 60 pauses,
    14 out#3, 14.5 dies -9 -> never overdue
within its grace: 10 in a 1 grace=0.5 patience=1, 11.1 told a reaped,
    11.1 dies -9 -> within its grace
to be reported: 10 in a 1 report, 11.1 told a reported, 11.1 dies -9 -> to be reported only
no word: 10 in a 1, 11.1 dies -9 -> without a word
another end: 10 in a 1, 11.1 told a recovered, 11.1 dies -9 -> without a word
no end: 10 in a 1, 11.1 told a expired, 11.1 dies -9 -> without a word
another block: 10 in a 1, 11.1 told b reaped, 11.1 dies -9 -> without a word, no expiry, no expiry
an earlier block: 10 in a 1, 11.1 told a reaped, 12 left, 100 in#2 a 1,
    101.1 dies -9 -> without a word, lived on, lived on
no report: 10 in a 1, 11.1 said a reaped, 11.1 dies -9 -> without a report
no word on a full disk: 10 in a 1, 10 fault 0 full disk, 11.1 dies -9 -> without a word
a crash: 10 in a 1, 10.5 dies -11 -> ended with -11
an end that nobody saw: 10 end -> nobody knows how it ended
an end in the midst: 10 in a 60, 12 dies 0 -> ended with 0 in the middle
a hang that nobody ends: 10 in a 1 -> nobody knows how it ended, was ended never
a hang that is ended too late: 10 in a 1, 26.5 told a reaped, 26.5 dies -9 -> late, bound
faults at once cost no more: 10 in a 1, 12 fault 3 machine stood still, 13 fault 3 8 busy processes,
    12 told a expired, 31 told a reaped, 31 dies -9 -> late, bound 19.0 s
a standstill that ended before: 10 in a 1, 10.1 fault 0.9 machine stood still, 26.5 told a reaped,
    26.5 dies -9 -> late, bound
one long ago: 10 in a 1, 8 fault 0.8 machine stood still, 26.5 told a reaped,
    26.5 dies -9 -> late, bound
one after it: 10 in a 1, 27.5 fault 0.8 machine stood still, 26.5 told a reaped,
    26.5 dies -9 -> late, bound
another worker stopped: 10 in a 1, 12 fault 0.8 another stopped, 26.5 told a reaped,
    26.5 dies -9 -> late, bound
never reported: 10 in a 1 report, 90 dies -9 by us -> was ended 79.0 s late
overdue for long: 10 in a 1, 21 left, 22 end, 23 dies 0 -> never told of
overdue for long (reap): 10 in a 1 reap, 21 left, 22 end, 23 dies 0 -> never told of
overdue for long (report): 10 in a 1 report, 21 left, 22 end, 23 dies 0 -> never told of
raised too early: 10 in a 1 raise, 10.5 raised, 10.6 left, 15 dies -9 by us -> TimerExpired in a
raised and not wanted: 10 in a 1, 11.2 raised, 11.3 left, 15 dies -9 by us -> TimerExpired in a
told too early: 10 in a 1, 10.5 told a expired, 11.1 told a reaped, 11.1 dies -9 -> no expiry
told of another: 10 in a 1, 11.5 told b expired, 11.1 told a reaped, 11.1 dies -9 -> no expiry
told too late: 10 in a 1, 40 told a expired, 11.1 told a reaped, 11.1 dies -9 -> no expiry
told of a program that is no more: 10 in a 1, 10.2 executing, 10.4 dies None,
    11.5 said a expired -> belongs to no expiry
told of one that has ended: 10 in a 1, 10.1 end, 10.2 dies 0, 11.5 said a reaped -> no expiry
said to be dead: 10 in a 1, 11.5 said a reaped, 12 left, 40 end, 41 dies 0 -> which lived on
an end told twice: 10 in a 1, 11.1 told a reaped, 11.4 said a gone, 11.1 dies -9 -> told of 2 times
reported twice: 10 in a 1, 11.1 told a reaped, 11.4 reported a gone,
    11.1 dies -9 -> told of 2 times
expired twice with one watcher: 10 in a 1, 11.1 told a expired, 11.8 told a expired,
    12.1 told a reaped, 12.1 dies -9 -> told of 2 times
another program was asked long after: 10 in a 1, 10.1 executing, 11.5 dies -63 -> ended with -63
who was not overdue was asked: 10 in a 60, 11.1 executing, 11.2 dies -63 -> ended with -63
before the next program could say a word: 10 in a 1, 10.1 executing, 11.5 dies -9 -> never overdue
"""
FINE_IN_A_STORM = """
a hang: 4 quick, 8 quick, 10 in a 4, 16 dies -9
silent as the machine stood still: 4 quick, 8 quick, 9 fault 6 machine stood still, 17 quick,
    18 dies -9 by us
one of many blocks that pass: 0.1 passing 1, 1.2 dies -9
"""
FOUND_IN_A_STORM = """
a survivor that is killed: 4 quick, 8 quick, 8.5 dies -9 -> never overdue
one that stands still: 4 quick, 8 quick, 20 dies -9 by us -> stood still for 12.0 s
one that did: 4 quick, 8 quick, 17 quick, 18 dies -9 by us -> stood still for 9.0 s
a hang that lives on: 4 quick, 8 quick, 10 in a 1, 17 dies -9 by us -> ended 6.0 s late, bound 5.0 s
too early for any that passes: 0.1 passing 1, 1 dies -9 -> never overdue
"""


class Story(History):
    """A history of one process, made of a line of the tables above."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self._lines: list[dict[str, Any]] = [{"at": 0.0, "do": "start", "pid": PID}]
        death: tuple[float, list[str]] | None = None
        looked: float | None = None
        for event in re.split(r",\s+", line) if line else []:
            time, verb, *words = event.split()
            at, (verb, _, number) = float(time), verb.partition("#")
            if verb in ("said", "reported", "told"):
                self._hear(at, verb, *words)
            elif verb == "fault":
                pid = {"worker": PID, "another": PID + 1}.get(words[1], 0)
                self.faults.append(Fault(at, " ".join(words[1:]), float(words[0]), pid))
            elif verb == "logged":
                self.logged.append((PID, words[0]))
            elif verb == "dies":
                death = at, words
            elif verb == "looked":
                looked = at
            else:
                self._log(at, verb, int(number or 1), words)
        life = life_of([json.dumps(record) + "\n" for record in self._lines])
        assert life is not None
        self.life = life
        self.lives.append(life)
        if death is not None:
            life.lived = life.ended = death[0]
            life.status, life.by_us = (
                json.loads(death[1][0].replace("None", "null")),
                "us" in death[1],
            )
        life.lived = looked or life.lived

    def _hear(self, at: float, verb: str, scope: str, outcome: str) -> None:
        if verb != "reported":
            self.statements.append(Statement(at, PID, scope, outcome))
        if verb == "reported" or (verb == "told" and outcome != "expired"):
            self.statements.append(Statement(at, PID, scope, outcome, True))

    def _log(self, at: float, verb: str, block: int, words: list[str]) -> None:
        record = {"at": at, "block": block}
        if verb == "in":
            scope, limit, *options = words
            given = (option.partition("=") for option in options)
            more: dict[str, Any] = {key: float(value) for key, _, value in given if value}
            (*_, on_expiry) = [None, *({"report", "raise", "reap"} & set(options))]
            more |= {"scope": scope, "limit": float(limit), "pauses": "pauses" in options}
            self._lines.append({**record, "do": "entering", "on_expiry": on_expiry, **more})
            self._lines.append({**record, "do": "entered", "watched": "unwatched" not in options})
        elif verb == "out":
            self._lines += [{**record, "do": "leaving"}, {**record, "do": "left"}]
        else:
            self._lines.append(
                {**record, "do": verb, **({"limit": float(words[0])} if words else {})}
            )


def rows(table: str) -> list[Any]:
    """Return name, line and what is to be found, of each row of a table."""
    found = re.findall(r"^(\S.*?): (.*?)(?: -> (.*))?$", table.strip().replace("\n    ", " "), re.M)
    return [pytest.param(line, problem, id=name) for name, line, problem in found]


@pytest.mark.parametrize(
    ("line", "problem", "rules"),
    [
        pytest.param(*row.values, rules, id=row.id)
        for tables, rules in ((FINE + FOUND, SOAK), (FINE_IN_A_STORM + FOUND_IN_A_STORM, STORM))
        for row in rows(tables)
    ],
)
def test_what_is_planted_is_found_and_nothing_else(line: str, problem: str, rules: Rules) -> None:
    found = Checker(Story(line), rules).problems()
    wanted = problem.split(", ") if "bound" not in problem else [problem]
    assert len(found) == len(wanted) * bool(problem), found
    assert all(any(want in one for one in found) for want in wanted if problem), found


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("11.2 dies -9", False),
        ("10.5 in b 0.1 unwatched, 11.2 dies -9", False),
        ("10.95 in b 60, 11.2 dies -9", True),
        ("10.5 in b 60, 10.9 out, 11.2 dies -9", True),
        ("10.5 in b 60, 10.9 out, 11 executing, 11.2 dies -9", False),
    ],
    ids=["armed nothing", "is no worker", "armed", "is a worker", "its new program is none"],
)
def test_only_a_child_that_is_no_worker_may_die_with_its_parent(line: str, is_found: bool) -> None:
    parent, child = Story("10 in a 1, 11.1 told a reaped, 11.1 dies -9"), Story(line).life
    child.pid = PID + 1
    parent.life.forked.append(child.pid)
    parent.lives.append(child)
    found = Checker(parent).problems()
    assert ["never overdue" in one for one in found] == [True] * is_found
    parent.life.forked.clear()
    assert len(Checker(parent).problems()) == 1, "nobody who died has forked it"


def test_a_block_of_the_program_before_an_exec_justifies_nothing() -> None:
    before, after = Story("10 in a 1, 10.5 dies None"), Story("11.5 dies -9")
    before.lives += after.lives
    (problem,) = Checker(before).problems()
    assert "never overdue" in problem


@pytest.mark.parametrize("late", [0.5, 3.0])
def test_kills_that_are_late_as_a_rule(late: float) -> None:
    history = History()
    for n in range(0, 3000, 100):
        end = n + 1 + late
        one = Story(f"{n} in {n} 1, {end} told {n} reaped, {end} dies -9")
        history.lives += one.lives
        history.statements += one.statements
    wanted = ["half of the blocks were ended more than 1 s late"][: late > 2]
    assert Checker(history).problems() == wanted


def test_bystanders_leaks_errors_and_complaints_are_problems() -> None:
    story = Story("2 dies -9 by us")
    story.life.problems.append("open before: 3, then: 4")
    story.leaks.append("a memfd")
    story.errors.append("in log: Traceback")
    assert len(Checker(story).problems()) == 3
    (problem,) = Checker(History(bystanders=[("rings", 0), ("is busy", -9)])).problems()
    assert problem == "a bystander, is busy, was killed: it ended with -9"


def test_a_soak_in_which_nothing_happened_proves_nothing() -> None:
    assert len(Checker(History()).idleness()) == 4
    busy = Story("10 in a 1 raise, 11.2 raised, 11.3 left, 11.5 fault 0 watcher lost")
    hang = Story("10 in a 1, 11.1 dies -9").life
    busy.lives.append(hang)
    assert Checker(busy).idleness() == []
    hang.blocks[1].watched = False
    assert Checker(busy).idleness() == ["1 of 2 blocks were unwatched"]


def test_a_line_that_a_kill_cut_short_does_not_count() -> None:
    whole = json.dumps({"at": 0.0, "do": "start", "pid": PID}) + "\n"
    made = life_of([whole, '{"at": 1.0, "do": "ent'])
    assert made is not None
    assert made.blocks == {}
    assert made.ended == inf
    assert life_of([]) is None


def test_a_problem_that_a_process_logs_is_its_own() -> None:
    lines = [{"at": 0.0, "do": "start", "pid": PID}, {"at": 1.0, "do": "problem", "scope": "x"}]
    made = life_of([json.dumps(line) + "\n" for line in lines])
    assert made is not None
    assert made.problems == ["x"]


def test_each_life_has_its_own_end() -> None:
    """Of one number: a program, the one that took its place, and a process that came later."""
    before, after, later = (Life(PID, started) for started in (1.0, 2.0, 10.0))
    parent = Life(PID + 1, 0.0, waited=[Death(4.0, 5.0, PID, -9)])
    # The driver sees what the parent has seen, too, since it was killed before it reaped it.
    seen = [
        Death(5.9, 6.0, PID, -9),
        Death(5.9, 6.0, PID + 1, -9, by_us=True),
        Death(11.0, 12.0, PID, 0),
        unknown := Death(1.0, 2.0, PID + 2, -9),
    ]
    assert bury([later, after, before, parent], seen) == [unknown]
    ends = [(life.lived, life.ended, life.status) for life in (before, after, later)]
    assert ends == [(2.0, 2.0, None), (4.0, 5.0, -9), (11.0, 12.0, 0)]
    assert (parent.by_us, after.by_us) == (True, False)
