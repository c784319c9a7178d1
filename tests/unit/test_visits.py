"""What one visit of a page leaves to the next; the races that tests/model found."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from math import inf, isfinite
from pathlib import Path

import pytest

from fuzz.bounds import in_time
from hangwatch.evidence.model import Case
from hangwatch.page import layout
from hangwatch.page.layout import DEADLINE, ENTRY, LIMIT, SLOTS_IN_USE, deadline_word
from hangwatch.page.view import Armed
from hangwatch.process import Identity
from hangwatch.watcher import watcher as watcher_module
from hangwatch.watcher.case import case_of
from hangwatch.watcher.settings import checked_settings
from hangwatch.watcher.visit import visit
from hangwatch.watcher.watched import Watched
from hangwatch.watcher.watcher import Watcher
from hangwatch.wire import Hello
from support.pages import quiet_page, write_details


class Scene:
    """A watcher in this process that watches a page of this process, by hand."""

    def __init__(self, words: memoryview[float], watched: Watched, watcher: Watcher) -> None:
        self.words, self.worker, self.watcher = words, watched, watcher

    def arm(self, index: int, deadline: float, entry: float = 1.0) -> None:
        at = deadline_word(index)
        self.words[at + LIMIT] = 1.0
        self.words[at + ENTRY] = entry
        self.words[at + DEADLINE] = deadline
        self.words[SLOTS_IN_USE] = max(self.words[SLOTS_IN_USE], index + 1.0)

    def found(self) -> list[tuple[int, float]]:
        """Return slot and deadline of every verdict so far."""
        slots = [incident.verdict.found for incident in self.watcher._incidents]
        return [(slot.index, slot.deadline) for slot in slots if isinstance(slot, Armed)]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with quiet_page() as client, tempfile.TemporaryDirectory() as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(Path(folder) / "socket"))
        listener.listen()
        link, keeper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = checked_settings(on_expiry="report", tree=False, report_dir=None)
        with listener, link, keeper, theirs:
            watched = Watched(
                connection=ours,
                identity=Identity(os.getpid(), os.getuid(), 0, os.pidfd_open(os.getpid())),
                hello=Hello(client.page.descriptor.number, 0.0, True, {}, [], "", None),
                reader=client.reader(),
                stacks_inode=(0, 0),
            )
            watcher = Watcher(listener, link, settings)
            watcher.loop.add(ours.fileno(), lambda: None)
            yield Scene(client.page.words, watched, watcher)
            watched.close()


def test_what_was_armed_within_a_pause_is_not_due_if_only_the_pause_was_missed(
    scene: Scene,
) -> None:
    details = layout.SlotDetails(600.0, 1, 1, "thread", "pause", pauses=True)
    write_details(scene.words.cast("B"), 0, details)
    now = time.monotonic()
    scene.arm(1, deadline=now)

    def begins_meanwhile() -> float:
        scene.arm(0, deadline=now + 600)
        return now + 0.1

    before: list[float] = []
    found = visit(scene.worker.reader, lambda: True, begins_meanwhile, before, {})
    assert found.due == []
    scene.words[deadline_word(0)] = 0.0
    found = visit(scene.worker.reader, lambda: True, lambda: now + 0.1, before, {})
    assert [slot.index for slot in found.due] == [1], "the pause has ended"


def test_another_due_block_is_found_if_the_first_ends_meanwhile(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_meanwhile(worker: Watched, slot: Armed, at: float) -> Case | None:
        scene.words[deadline_word(0)] = 0.0
        return case_of(worker, slot, at)

    monkeypatch.setattr(watcher_module, "case_of", ends_meanwhile)
    now = time.monotonic()
    scene.arm(0, now - 2)
    scene.arm(1, now - 1)
    scene.watcher._visit(scene.worker)
    assert scene.found() == []
    assert scene.watcher._visits.next() <= time.monotonic()
    scene.watcher._visit_due()
    assert scene.found() == [(1, now - 1)]


def test_a_block_whose_deadline_is_set_anew_is_found_again(scene: Scene) -> None:
    now = time.monotonic()
    scene.arm(0, now - 2)
    scene.watcher._visit(scene.worker)
    scene.worker.at_issue = None
    scene.arm(0, now - 1)  # the same entry: a slow ring has returned
    scene.watcher._visit(scene.worker)
    assert scene.found() == [(0, now - 2), (0, now - 1)]


def test_one_incident_at_a_time_also_before_it_has_begun(scene: Scene) -> None:
    now = time.monotonic()
    scene.arm(0, now - 2)
    scene.arm(1, now - 1)
    scene.watcher._visit(scene.worker)
    scene.watcher._visit(scene.worker)
    assert scene.found() == [(0, now - 2)]


def test_whichever_visit_comes_first_hears_a_muted_worker_again(scene: Scene) -> None:
    worker = scene.worker
    worker.budget.credit = -1000.0
    worker.budget._filled_at = time.monotonic()
    scene.watcher._visit(worker)
    assert worker.muted
    worker.budget.credit = 0.05
    scene.watcher._visit(worker)  # a sweep, or the end of an incident
    assert (worker.muted, scene.watcher._visits.next()) == (False, inf)


def test_what_was_judged_is_forgotten_though_something_is_due_at_each_visit(scene: Scene) -> None:
    now = time.monotonic()
    for count in range(3000):
        scene.arm(0, now - 1, entry=float(count))
        scene.worker.at_issue = None
        scene.watcher._visit(scene.worker)
        scene.worker.budget.credit = 0.05
        scene.watcher._incidents.clear()
    assert len(scene.worker.judged) < 1010


def test_reading_a_page_of_nonsense_takes_no_time_and_says_something() -> None:
    """Whatever bytes a worker writes, also 4,096 blocks in each other, pauses, or NaN."""
    rng = random.Random(11)
    with quiet_page() as client:
        reader, words, memory = client.reader(), client.page.words, client.page.memory
        words[SLOTS_IN_USE] = layout.CAPACITY

        def read(kind: bytes) -> None:
            armed = reader.armed()
            assert kind == b"noise" or len(armed) == layout.CAPACITY
            for slot in [*armed[:3], Armed(0, 7.0, 1.0), Armed(layout.CAPACITY - 1, 7.0, 1.0)]:
                spent = reader.spent(slot, 5.0)
                assert all(isfinite(t or 0.0) for t in (spent.limit, spent.inside))
                assert len(reader.within(slot)) <= 32
                assert len(reader.chain(slot)) <= 33
                assert isinstance(reader.task(slot), float)
                assert reader.was_skipped(slot) in (True, False)
                chosen = reader.policy(slot)
                assert chosen.grace is None or 0 <= chosen.grace <= 86400
                assert chosen.signal is None or chosen.signal == -1 or 0 < chosen.signal <= 64
                assert reader.change_of(slot) in (
                    *(None, "the block has ended", "the block has got more time"),
                    "the process has paused its timers",
                )
                assert reader.was_raised(slot) in (True, False)
            assert isinstance(reader.is_paused(), bool)
            assert 0 <= reader.raise_signal() <= 64

        for kind in (b"nested", b"pauses", b"noise"):
            for index in range(layout.CAPACITY):
                at = deadline_word(index)
                if kind == b"noise":
                    start = layout.slot_byte(index)
                    memory[start : start + layout.SLOT_BYTES] = rng.randbytes(layout.SLOT_BYTES)
                    continue
                words[at + DEADLINE], words[at + ENTRY], words[at + LIMIT] = 1.0, 7.0, 1.0
                memory[layout.slot_byte(index) + 48] = layout.PAUSES * (kind == b"pauses")
            in_time(read, kind)
        reader.close()
