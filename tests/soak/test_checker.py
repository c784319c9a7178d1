"""The checker finds what is planted, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest

from soak.checker import WITHIN, Checker
from soak.history import Death, Fault, History, Life, Statement, bury, life_of

PID = 7


def life(*records: tuple[float, str, dict[str, Any]], child: bool = False) -> Life:
    """Make a process's life of its log: when, what, and the rest of each record."""
    start = {"at": 0.0, "do": "start", "pid": PID, "child": child}
    lines = [start, *({"at": at, "do": do, "block": 1, **more} for at, do, more in records)]
    made = life_of([json.dumps(line) + "\n" for line in lines])
    assert made is not None
    return made


def entered(at: float, limit: float = 1.0, **more: Any) -> list[tuple[float, str, dict[str, Any]]]:
    """Enter a block at once, watched."""
    fields = {"scope": "a", "limit": limit, **more}
    entered = {"block": more.get("block", 1), "watched": True}
    return [(at, "entering", fields), (at, "entered", entered)]


def dead(of: Life, at: float, status: int | None = -9, by_us: bool = False) -> Life:
    of.lived, of.ended, of.status, of.by_us = at, at, status, by_us
    return of


def problems(
    *lives: Life,
    said: list[tuple[float, str, str]] | None = None,
    reported: list[tuple[float, str, str]] | None = None,
    faults: list[Fault] | None = None,
    **more: Any,
) -> list[str]:
    statements = [Statement(at, PID, scope, outcome) for at, scope, outcome in said or []]
    # An event of an end and the report go together, unless a test says otherwise.
    ends = [one for one in said or [] if one[2] != "expired"] if reported is None else reported
    statements += [Statement(at, PID, scope, outcome, True) for at, scope, outcome in ends]
    history = History(list(lives), faults or [], statements, **more)
    return Checker(history).problems()


REAPED = [(11.1, "a", "reaped")]


def test_a_hang_that_is_killed_and_explained_is_as_it_should_be() -> None:
    assert problems(dead(life(*entered(10.0)), 11.1), said=REAPED) == []


def test_a_bystander_that_is_killed() -> None:
    (problem,) = problems(bystanders=[("rings", 0), ("is busy", -9)])
    assert problem == "a bystander, is busy, was killed: it ended with -9"


@pytest.mark.parametrize("late", [0.5, 3.0])
def test_kills_that_are_late_as_a_rule(late: float) -> None:
    lives = [dead(life(*entered(100.0 * n, scope=str(n))), 100 * n + 1 + late) for n in range(30)]
    said = [(100 * n + 1 + late, str(n), "reaped") for n in range(30)]
    assert (
        problems(*lives, said=said)
        == ["half of the blocks were ended more than 1 s late"][: late > 2]
    )


def test_faults_at_the_same_time_cost_no_more_than_that() -> None:
    hang, late = life(*entered(10.0)), 11.0 + WITHIN + 5.0
    said = [(late, "a", "reaped"), (12.0, "a", "expired")]
    beside = [Fault(12.0, "machine stood still", 3.0), Fault(13.0, "8 busy processes", 3.0)]
    (problem,) = problems(dead(hang, late), said=said, faults=beside)
    assert "late, bound 19.0 s" in problem
    after = [*beside, Fault(20.0, "machine stood still", 2.0)]
    assert problems(dead(hang, late), said=said, faults=after) == []


def test_who_leaves_in_time_and_ends_well_is_as_it_should_be() -> None:
    well = life(*entered(10.0), (10.5, "leaving", {}), (10.5, "left", {}), (12.0, "end", {}))
    assert problems(dead(well, 13.0, 0)) == []


def test_a_kill_before_the_deadline() -> None:
    (problem,) = problems(dead(life(*entered(10.0)), 10.9))
    assert "never overdue" in problem


def test_a_kill_after_it_was_disarmed_in_time() -> None:
    left = life(*entered(10.0), (10.5, "leaving", {}), (10.6, "left", {}))
    (problem,) = problems(dead(left, 11.5))
    assert "never overdue" in problem


def test_a_kill_after_it_was_disarmed_too_late() -> None:
    left = life(*entered(10.0), (11.5, "leaving", {}), (11.6, "left", {}))
    said = [(11.65, "a", "reaped")]
    assert problems(dead(left, 11.65), said=said) == [], "it was a close race"
    (problem,) = problems(dead(left, 12.0), said=[(11.2, "a", "expired")])
    assert "never overdue then" in problem
    slow = [Fault(11.3, "machine stood still", 0.5)]
    assert problems(dead(left, 12.0), said=[(12.0, "a", "reaped")], faults=slow) == []


def test_a_death_that_is_seen_late_may_have_been_any_time_since_the_look_before() -> None:
    left = life(*entered(10.0), (11.5, "leaving", {}), (11.6, "left", {}))
    seen = dead(left, 12.0)
    seen.lived = 11.5
    assert problems(seen, said=[(11.7, "a", "reaped")]) == []


def test_a_kill_outside_of_every_block() -> None:
    (problem,) = problems(dead(life(), 5.0))
    assert "never overdue" in problem


def test_a_kill_for_what_was_renewed() -> None:
    renewed = [*entered(10.0), (10.9, "renewing", {}), (10.95, "renewed", {"limit": 1.0})]
    assert problems(dead(life(*renewed), 12.0), said=[(12.0, "a", "reaped")]) == []
    (problem,) = problems(dead(life(*renewed), 11.5))
    assert "never overdue" in problem


def test_a_kill_in_the_middle_of_a_renewal_may_follow_the_old_deadline() -> None:
    renewing = life(*entered(10.0), (10.9, "renewing", {}))
    assert problems(dead(renewing, 11.1), said=REAPED) == []


def test_a_kill_within_a_grace() -> None:
    patient = entered(10.0, grace=0.5, patience=1.0)
    (problem,) = problems(dead(life(*patient), 11.1), said=REAPED)
    assert "within its grace" in problem
    assert problems(dead(life(*patient), 11.1, -15), said=REAPED) == [], "by what came first"
    assert problems(dead(life(*patient), 11.6), said=[(11.6, "a", "reaped")]) == []


def test_a_kill_for_what_was_cancelled() -> None:
    (problem,) = problems(dead(life(*entered(10.0), (10.5, "cancelled", {})), 11.5))
    assert "never overdue" in problem


PAUSED = [
    *entered(10.0),
    *entered(10.5, 60.0, scope="pause", pauses=True, block=2),
]
GOES_ON = [(15.0, "leaving", {"block": 2}), (15.0, "left", {"block": 2})]


def test_a_kill_during_a_pause() -> None:
    (problem,) = problems(dead(life(*PAUSED), 12.0))
    assert "never overdue" in problem


@pytest.mark.parametrize("end", ["left", "cancelled"])
def test_a_kill_and_words_for_a_block_within_a_pause(end: str) -> None:
    within = [*entered(11.0, 0.5, scope="b", block=3), (12.5, end, {"block": 3})]
    begun = life(*PAUSED, *within)
    assert problems(dead(begun, 20.0, 0, by_us=True)) == []
    (problem,) = problems(dead(begun, 12.4))
    assert "never overdue" in problem
    (problem, *_) = problems(dead(begun, 20.0, 0, by_us=True), said=[(12.0, "b", "recovered")])
    assert "belongs to no expiry" in problem


def test_a_pause_gives_its_time_back() -> None:
    (problem,) = problems(dead(life(*PAUSED, *GOES_ON), 15.4))
    assert "never overdue" in problem
    assert problems(dead(life(*PAUSED, *GOES_ON), 15.6), said=[(15.6, "a", "reaped")]) == []


def test_an_inner_pause_gives_nothing_back_before_the_outer_ends() -> None:
    inner = [
        *entered(11.0, 60.0, scope="inner", pauses=True, block=3),
        (14.0, "leaving", {"block": 3}),
        (14.0, "left", {"block": 3}),
    ]
    assert problems(dead(life(*PAUSED, *inner), 14.5))
    assert problems(dead(life(*PAUSED, *inner, *GOES_ON), 15.6), said=[(15.6, "a", "reaped")]) == []


def test_a_pause_that_overruns() -> None:
    pause = life(*entered(10.0, 0.5, scope="pause", pauses=True))
    assert problems(dead(pause, 10.6), said=[(10.6, "pause", "reaped")]) == []


def test_a_kill_for_what_was_only_to_be_reported() -> None:
    asked = life(*entered(10.0, on_expiry="report"))
    (problem,) = problems(dead(asked, 11.1), said=[(11.1, "a", "reported")])
    assert "to be reported only" in problem


@pytest.mark.parametrize(
    "said",
    [[], [(11.1, "a", "recovered")], [(11.1, "a", "expired")], [(11.1, "b", "reaped")]],
    ids=["no word", "another end", "no end", "another block"],
)
def test_a_kill_without_a_word(said: list[tuple[float, str, str]]) -> None:
    found = problems(dead(life(*entered(10.0)), 11.1), said=said)
    assert any("without a word" in problem for problem in found)


def test_a_word_about_an_earlier_block_explains_no_kill() -> None:
    twice = [*entered(10.0), (12.0, "left", {}), *entered(100.0, block=2)]
    found = problems(dead(life(*twice), 101.1), said=[(11.1, "a", "reaped")])
    assert any("without a word" in problem for problem in found)


def test_a_kill_without_a_report() -> None:
    hang = dead(life(*entered(10.0)), 11.1)
    (problem,) = problems(hang, said=REAPED, reported=[])
    assert "without a report" in problem
    full = [Fault(10.0, "full disk", 0.0)]
    assert problems(hang, said=REAPED, reported=[], faults=full) == []
    assert problems(hang, faults=full)
    assert problems(hang, faults=full, logged=[(PID, "a")]) == [], "all of it stands in the log"


def test_a_crash() -> None:
    (problem,) = problems(dead(life(*entered(10.0)), 10.5, -11))
    assert "ended with -11" in problem


def test_a_worker_that_the_injector_killed_is_nobody_s_fault() -> None:
    assert problems(dead(life(*entered(10.0)), 10.5, by_us=True)) == []


def test_an_end_that_nobody_saw() -> None:
    (problem,) = problems(life((10.0, "end", {})))
    assert "nobody knows how it ended" in problem


def test_an_end_in_the_middle() -> None:
    (problem,) = problems(dead(life(*entered(10.0, 60.0)), 12.0, 0))
    assert "ended with 0 in the middle" in problem


def test_a_hang_that_nobody_ends() -> None:
    assert any("was ended never" in problem for problem in problems(life(*entered(10.0))))


def test_a_hang_that_is_ended_too_late() -> None:
    late = 11.0 + WITHIN + 0.5
    (problem,) = problems(dead(life(*entered(10.0)), late), said=[(late, "a", "reaped")])
    assert "late, bound" in problem


def test_a_standstill_around_it_lengthens_the_bound_and_one_long_ago_does_not() -> None:
    late = 11.0 + WITHIN + 0.5
    hang = dead(life(*entered(10.0)), late)
    said = [(late, "a", "reaped")]
    assert problems(hang, said=said, faults=[Fault(12.0, "machine stood still", 0.8)]) == []
    assert problems(hang, said=said, faults=[Fault(10.7, "machine stood still", 0.9)]) == []
    assert problems(hang, said=said, faults=[Fault(10.1, "machine stood still", 0.9)])
    assert problems(hang, said=said, faults=[Fault(8.0, "machine stood still", 0.8)])
    assert problems(hang, said=said, faults=[Fault(late + 1, "machine stood still", 0.8)])
    assert problems(hang, said=said, faults=[Fault(12.0, "worker stopped", 0.8, PID + 1)])


def test_a_grace_lengthens_the_bound() -> None:
    late = 11.0 + WITHIN + 0.5
    said = [(late, "a", "reaped")]
    assert problems(dead(life(*entered(10.0, patience=1.0)), late), said=said) == []


def test_a_hang_that_nobody_could_watch_is_nobody_s_fault() -> None:
    unwatched = life(
        (10.0, "entering", {"scope": "a", "limit": 1.0}), (10.0, "entered", {"watched": False})
    )
    assert problems(dead(unwatched, 90.0, by_us=True)) == []


def test_what_is_to_be_reported_must_be_reported() -> None:
    asked = dead(life(*entered(10.0, on_expiry="report")), 90.0, by_us=True)
    assert problems(asked, said=[(11.5, "a", "reported")]) == []
    (problem,) = problems(asked)
    assert "was ended 79.0 s late" in problem


@pytest.mark.parametrize("on_expiry", ["report", "reap", None])
def test_what_was_overdue_for_long_must_have_been_told_of(on_expiry: str | None) -> None:
    slow = [*entered(10.0, on_expiry=on_expiry), (21.0, "left", {}), (22.0, "end", {})]
    assert problems(dead(life(*slow), 23.0, 0), said=[(21.0, "a", "recovered")]) == []
    (problem,) = problems(dead(life(*slow), 23.0, 0))
    assert "never told of" in problem


def test_what_is_raised_where_nothing_is_overdue() -> None:
    asked = entered(10.0, on_expiry="raise")
    good = life(*asked, (11.2, "raised", {}), (13.0, "left", {}), (14.0, "end", {}))
    assert problems(dead(good, 15.0, 0), said=[(11.2, "a", "raised")]) == []
    (problem,) = problems(
        dead(life(*asked, (10.5, "raised", {}), (10.6, "left", {})), 15.0, by_us=True)
    )
    assert "TimerExpired in a" in problem


def test_what_is_raised_where_it_was_not_wanted() -> None:
    (problem,) = problems(
        dead(life(*entered(10.0), (11.2, "raised", {}), (11.3, "left", {})), 15.0, by_us=True)
    )
    assert "TimerExpired in a" in problem


@pytest.mark.parametrize(
    "statement",
    [(10.5, "a", "expired"), (11.5, "b", "expired"), (40.0, "a", "expired")],
    ids=["too early", "another", "too late"],
)
def test_a_report_of_what_did_not_expire(statement: tuple[float, str, str]) -> None:
    hang = dead(life(*entered(10.0)), 11.1)
    (problem,) = problems(hang, said=[*REAPED, statement])
    assert "belongs to no expiry" in problem


def test_a_word_about_a_program_that_is_no_more() -> None:
    gone = dead(life(*entered(10.0), (10.2, "executing", {})), 10.4, None)
    (problem,) = problems(gone, said=[(11.5, "a", "expired")])
    assert "belongs to no expiry" in problem
    exited = dead(life(*entered(10.0), (10.1, "end", {})), 10.2, 0)
    (problem,) = problems(exited, said=[(11.5, "a", "reaped")], reported=[])
    assert "belongs to no expiry" in problem


def test_who_is_said_to_be_dead_and_lives() -> None:
    slow = life(*entered(10.0), (12.0, "left", {}), (40.0, "end", {}))
    (problem,) = problems(dead(slow, 41.0, 0), said=[(11.5, "a", "reaped")], reported=[])
    assert "which lived on" in problem


@pytest.mark.parametrize("report", [False, True])
def test_an_end_that_is_told_twice(report: bool) -> None:
    twice = [(11.1, "a", "reaped"), (11.4, "a", "gone")]
    said, reported = (REAPED, twice) if report else (twice, REAPED)
    (problem,) = problems(dead(life(*entered(10.0)), 11.1), said=said, reported=reported)
    assert "told of 2 times" in problem


def test_each_watcher_may_say_that_a_block_has_expired() -> None:
    hang = dead(life(*entered(10.0)), 12.1)
    said = [(11.1, "a", "expired"), (11.8, "a", "expired"), (12.1, "a", "reaped")]
    assert problems(hang, said=said, faults=[Fault(11.5, "watcher lost", 0.0)]) == []
    (problem,) = problems(hang, said=said)
    assert "told of 2 times" in problem


def test_a_child_that_armed_nothing_may_die_with_its_parent_and_a_worker_may_not() -> None:
    parent = life(*entered(10.0), (10.9, "forked", {"pid": PID + 1}))
    parent = dead(parent, 11.1)
    child = dead(life(child=True), 11.2)
    child.pid = PID + 1
    assert problems(parent, child, said=REAPED) == []
    (problem,) = problems(child, said=[])
    assert "never overdue" in problem
    unwatched = [(10.5, "entering", {"scope": "b", "limit": 0.1}), (10.5, "entered", {})]
    child.blocks = life(*unwatched).blocks
    assert problems(parent, child, said=REAPED) == [], "overdue, but no worker"
    child.blocks = {}
    armed = dead(life(*entered(10.95, 60.0), child=True), 11.2)
    armed.pid = PID + 1
    (problem,) = problems(parent, armed, said=REAPED)
    assert "never overdue" in problem
    child.watched = True
    (problem,) = problems(parent, child, said=REAPED)
    assert "never overdue" in problem
    child.executing = 11.0
    assert problems(parent, child, said=REAPED) == [], "its new program was no worker yet"


def test_a_block_of_the_program_before_an_exec_justifies_nothing() -> None:
    before = dead(life(*entered(10.0)), 10.5, None)
    after = dead(life(), 11.5)
    (problem,) = problems(before, after)
    assert "never overdue" in problem


def test_nor_before_the_program_after_it_could_say_a_word() -> None:
    between = dead(life(*entered(10.0), (10.1, "executing", {})), 11.5)
    (problem,) = problems(between)
    assert "never overdue" in problem
    # But it may not have got to it.
    stopped = [Fault(10.1, "worker stopped", 1.0, PID)]
    assert problems(between, said=[(11.5, "a", "reaped")], faults=stopped) == []


def test_whatever_leaked_failed_or_was_complained_of_is_a_problem() -> None:
    complaining = dead(life((1.0, "problem", {"scope": "open before: 3, then: 4"})), 2.0, -9, True)
    assert len(problems(complaining, leaks=["a memfd"], errors=["in log: Traceback"])) == 3


def test_a_soak_in_which_nothing_happened_proves_nothing() -> None:
    assert len(Checker(History()).idleness()) == 4
    raised = life(*entered(10.0, on_expiry="raise"), (11.2, "raised", {}), (11.3, "left", {}))
    hang = dead(life(*entered(10.0)), 11.1)
    busy = History([raised, hang], [Fault(1.0, "watcher lost", 0.0)])
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


def test_each_life_has_its_own_end() -> None:
    """Of one number: a program, the one that took its place, and a process that came later."""
    before, after, later = (Life(PID, started) for started in (1.0, 2.0, 10.0))
    parent = Life(PID + 1, 0.0, waited=[Death(4.0, 5.0, PID, -9)])
    # The driver sees what the parent has seen, too, since it was killed before it reaped it.
    seen = [Death(5.9, 6.0, PID, -9), Death(5.9, 6.0, PID + 1, -9), Death(11.0, 12.0, PID, 0)]
    bury([later, after, before, parent], seen, {PID + 1})
    ends = [(life.lived, life.ended, life.status) for life in (before, after, later)]
    assert ends == [(2.0, 2.0, None), (4.0, 5.0, -9), (11.0, 12.0, 0)]
    assert (parent.by_us, after.by_us) == (True, False)
