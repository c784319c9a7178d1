"""What is due when, against the plainest possible model of it."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from hangwatch.agenda import Agenda

STEPS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 5), st.sampled_from([1.0, 2.0, 3.0, inf])),
    st.tuples(st.just("drop"), st.integers(0, 5), st.just(0.0)),
    st.tuples(st.just("take"), st.just(0), st.sampled_from([0.5, 1.0, 2.5, 3.0])),
)


@given(st.lists(STEPS, max_size=60))
def test_each_key_is_due_once_at_its_latest_time(steps: list[tuple[str, int, float]]) -> None:
    agenda = Agenda()
    model: dict[int, float] = {}
    for step, key, when in steps:
        if step == "put":
            agenda.put(key, when)
            model[key] = when
        elif step == "drop":
            agenda.drop(key)
            model.pop(key, None)
        else:
            taken = list(agenda.take(when))
            due = {key: at for key, at in model.items() if at <= when}
            assert dict(taken) == due
            assert len(taken) == len(due), "each of them once"
            assert [at for _, at in taken] == sorted(due.values())
            model = {key: at for key, at in model.items() if key not in due}
        assert agenda.next() == min(model.values(), default=inf)


def test_what_is_put_off_a_million_times_takes_no_memory() -> None:
    agenda = Agenda()
    agenda.put("far", 1e9)
    for number in range(100_000):
        agenda.put("often", 1e9 - number)
    assert len(agenda._heap) < 100
    assert [key for key, _ in agenda.take(inf)] == ["often", "far"]


def test_what_comes_to_be_due_while_it_is_taken_is_taken_as_well() -> None:
    """A page may be due again in the turn in which it was visited."""
    agenda = Agenda()
    agenda.put("a", 1.0)
    taken = []
    for key, when in agenda.take(2.0):
        taken.append((key, when))
        if len(taken) < 3:
            agenda.put("a", when + 0.5)
    assert taken == [("a", 1.0), ("a", 1.5), ("a", 2.0)]
