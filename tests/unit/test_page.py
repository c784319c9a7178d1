"""The page: its directory, and what it says of its blocks."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from hangwatch.errors import PageError
from hangwatch.page import layout
from hangwatch.page.layout import HEADER_BYTES, SLOT_BYTES, SLOTS, Area
from hangwatch.page.view import Armed, View
from support.pages import write_details

GROUPS = Area("groups", HEADER_BYTES, 64, 10)
"""An area of a later version."""


def page_of(areas: Sequence[Area], size: int = layout.PAGE_BYTES) -> memoryview:
    """Return a page with that directory, and nothing else in it."""
    memory = memoryview(bytearray(size))
    memory[:HEADER_BYTES] = layout.header(areas, size)
    return memory


def arm(memory: memoryview, slots: Area, index: int, scope: str, deadline: float) -> None:
    """Arm a slot wherever the page's slots are."""
    # As if the page began with its slots where this version has them.
    shifted = memory[slots.offset - HEADER_BYTES :]
    details = layout.SlotDetails(1.5, 7, 8, "MainThread", scope)
    write_details(shifted, index, details)
    words = shifted[: len(shifted) // 8 * 8].cast("d")
    words[layout.deadline_word(index) + layout.ENTRY] = 1.0
    words[layout.deadline_word(index)] = deadline


class TestDirectory:
    def test_areas_that_nobody_knows_are_ignored_and_slots_found_behind_them(self) -> None:
        slots = Area("slots", GROUPS.end, SLOT_BYTES, 3)
        later = Area("recent", slots.end + 8, 24, 5)
        memory = page_of([later, slots, GROUPS])
        memory[24:32] = struct.pack("=d", 3.0)
        arm(memory, slots, 2, "forward", 9.0)
        view = View(memory)
        assert view.slots == 3
        assert view.armed() == [Armed(2, 1.0, 9.0)]
        assert view.overdue(9.0) == view.armed()
        assert [details.scope for details in view.chain(Armed(2, 1.0, 9.0))] == ["forward"]

    def test_as_many_areas_fit_as_a_header_has_room_for(self) -> None:
        more = [Area(f"more {number}", SLOTS.end, 8, 0) for number in range(13)]
        assert View(page_of([SLOTS, *more])).slots == SLOTS.rows
        memory = page_of([SLOTS])
        memory[48:56] = struct.pack("=Q", 15)
        with pytest.raises(PageError, match="15 areas, at most 14"):
            View(memory)

    @pytest.mark.parametrize(
        ("areas", "why"),
        [
            ([], "has no slots"),
            ([GROUPS], "has no slots"),
            ([Area("slots", HEADER_BYTES, SLOT_BYTES, 0)], "has no slots"),
            ([Area("slots", HEADER_BYTES, SLOT_BYTES + 8, 9)], "have 328 bytes each.*install the"),
            ([Area("slots", HEADER_BYTES, SLOT_BYTES - 8, 9)], "have 312 bytes each.*install the"),
            ([Area("slots", HEADER_BYTES, SLOT_BYTES, 4097)], "out of range"),
            ([Area("slots", HEADER_BYTES - 8, SLOT_BYTES, 9)], "'slots' is out of range"),
            ([Area("slots", 0, SLOT_BYTES, 9)], "'slots' is out of range"),
            ([Area("slots", layout.PAGE_BYTES, SLOT_BYTES, 1)], "'slots' is out of range"),
            ([Area("slots", 2**64 - 8, SLOT_BYTES, 2**64 - 1)], "'slots' is out of range"),
            ([Area("slots", HEADER_BYTES + 4, SLOT_BYTES, 9)], "'slots' is misaligned"),
            ([Area("slots", HEADER_BYTES, SLOT_BYTES + 4, 9)], "'slots' is misaligned"),
            ([Area("slots", HEADER_BYTES, 0, 9)], "'slots' is misaligned"),
            ([GROUPS, Area("slots", HEADER_BYTES, SLOT_BYTES, 9)], "overlaps another"),
            ([GROUPS, Area("slots", GROUPS.end - 8, SLOT_BYTES, 9)], "'slots' overlaps another"),
            ([SLOTS, GROUPS], "overlaps another"),
            ([SLOTS, Area("groups", SLOTS.end, 64, 1)], "'groups' is out of range"),
            (
                [Area("slots", offset, SLOT_BYTES, 1) for offset in (HEADER_BYTES, 4096)],
                "'slots' is there twice",
            ),
        ],
    )
    def test_a_directory_that_is_wrong_is_refused_in_words(
        self, areas: list[Area], why: str
    ) -> None:
        with pytest.raises(PageError, match=why):
            View(page_of(areas))

    def test_more_slots_than_are_read_are_refused(self) -> None:
        slots = Area("slots", HEADER_BYTES, SLOT_BYTES, 4097)
        with pytest.raises(PageError, match="4097 slots, this watcher reads 4096 at most"):
            View(page_of([slots], slots.end))

    def test_a_page_of_another_size_than_it_says_is_refused(self) -> None:
        memory = page_of([SLOTS])
        with pytest.raises(PageError, match=f"has 4096 bytes instead of {layout.PAGE_BYTES}"):
            View(memory[:4096])
        with pytest.raises(PageError, match="has 100 bytes"):
            View(memory[:100])

    def test_another_layout_is_refused_before_anything_else_is_read(self) -> None:
        memory = page_of([])
        memory[7] = 2
        with pytest.raises(PageError, match="layout 2, this watcher reads 3: install the same"):
            View(memory)

    def test_a_directory_that_changes_later_is_not_read_again(self) -> None:
        memory = page_of([SLOTS])
        memory[24:32] = struct.pack("=d", 1.0)
        arm(memory, SLOTS, 0, "forward", 9.0)
        view = View(memory)
        memory[48:HEADER_BYTES] = b"\xff" * (HEADER_BYTES - 48)
        assert view.armed() == [Armed(0, 1.0, 9.0)]


def test_a_pause_suspends_the_others_until_its_own_deadline() -> None:
    memory = page_of([SLOTS])
    memory[24:32] = struct.pack("=d", 3.0)
    for index, (scope, deadline) in enumerate([("a", 5.0), ("b", 6.0), ("pause", 7.0)]):
        arm(memory, SLOTS, index, scope, deadline)
    view = View(memory)
    assert [slot.index for slot in view.overdue(5.5)] == [0]
    assert not view.is_paused()
    memory[layout.slot_byte(2) + 48] = layout.PAUSES
    assert view.is_paused()
    assert view.overdue(6.5) == []
    assert [slot.index for slot in view.overdue(7.0)] == [2]


def test_blocks_of_one_thread_and_task_are_in_each_other_by_their_time_of_entry() -> None:
    memory = page_of([SLOTS])
    words = memory.cast("d")
    words[3] = 6.0
    for index, scope in enumerate(["middle", "outer", "inner", "other thread", "task", "ended"]):
        arm(memory, SLOTS, index, scope, deadline=10.0 + index)
    entered = {0: 3.0, 1: 1.0, 2: 5.0, 3: 0.5, 4: 0.5, 5: 2.0}
    for index, when in entered.items():
        at = layout.deadline_word(index)
        words[at + layout.LIMIT] = words[at] - when
    words[layout.deadline_word(3) + layout.IDENT] = 7.0
    words[layout.deadline_word(4) + layout.TASK] = 7.0
    words[layout.deadline_word(5)] = 0.0
    view = View(memory)
    middle, outer, inner = view.armed()[:3]
    assert [details.scope for details in view.chain(inner)] == ["inner", "middle", "outer"]
    assert [details.scope for details in view.within(outer)] == ["inner", "middle"]
    assert [details.scope for details in view.chain(outer)] == ["outer"]
    assert [details.scope for details in view.within(middle)] == ["inner"]


def test_a_name_is_given_to_no_thread_whose_slots_were_given_back() -> None:
    memory = page_of([SLOTS])
    memory[24:32] = struct.pack("=d", 1.0)
    write_details(memory, 0, layout.SlotDetails(1.0, 7, 8, "loader", "step"))
    assert View(memory).thread_names() == {7: "loader"}
    memory.cast("d")[layout.deadline_word(0) + layout.IDENT] = 0.0
    assert View(memory).thread_names() == {}
