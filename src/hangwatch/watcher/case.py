"""What is known of a worker from its page and its hello, without asking it anything."""

from __future__ import annotations

import time
from time import monotonic

from hangwatch.evidence import proc
from hangwatch.evidence.model import GAP, Case, OpenScope, OtherWorker, Scope, ScopeThread, Worker
from hangwatch.page import layout
from hangwatch.page.view import Armed
from hangwatch.watcher.page_reader import Overdue, PageReader, Standstill
from hangwatch.watcher.watched import Watched


def case_of(worker: Watched, found: Overdue, at: float) -> Case | None:
    """Put together what is known of a worker that overran.

    Args:
        worker: whose block it is.
        found: what was found overdue.
        at: when that was (CLOCK_MONOTONIC).

    Returns:
        The case; None if the verdict does not hold any more.
    """
    scope = _gap(worker, found, at) if isinstance(found, Standstill) else _scope(worker, found, at)
    if not worker.reader.is_still(found):
        return None
    identity, hello = worker.identity, worker.hello
    return Case(
        at=time.time(),
        worker=Worker(
            pid=identity.pid,
            uid=identity.uid,
            start_time=proc.start_time(identity.start_ticks),
            labels=hello.labels,
            command=hello.command,
            python=hello.python,
        ),
        scope=scope,
    )


def _scope(worker: Watched, slot: Armed, at: float) -> Scope:
    details, *enclosing = worker.reader.chain(slot)
    spent = worker.reader.spent(slot, at)
    return Scope(
        name=details.scope,
        limit_s=spent.limit,
        inside_s=spent.inside,
        late_s=at - slot.deadline,
        entry=layout.times_entered(slot.entry),
        thread=ScopeThread(details.ident, worker.thread_id(details.native_id), details.thread_name),
        enclosing=[outer.scope for outer in enclosing],
        within=[inner.scope for inner in worker.reader.within(slot)],
        since_renewal_s=spent.since_renewal,
        pauses=details.pauses,
    )


def _gap(worker: Watched, found: Standstill, at: float) -> Scope:
    return Scope(
        name=GAP,
        limit_s=found.deadline - found.since,
        inside_s=at - found.since,
        late_s=at - found.deadline,
        entry=0,
        thread=ScopeThread(worker.hello.main_ident, worker.identity.pid, "MainThread"),
        enclosing=[],
    )


def doing_of(worker: Watched) -> OtherWorker:
    """Say which blocks a worker is inside of right now."""
    reader, now = worker.reader, monotonic()
    armed = reader.armed()
    pausing = {slot for slot in armed if reader.pauses(slot)}
    stands_at = min((now - reader.spent(slot, now).inside for slot in pausing), default=now)
    scopes = [
        scope
        for slot in armed
        # Of one without a deadline an inner block may stand for it.
        if slot.deadline < layout.NEVER
        and (scope := _open_scope(reader, slot, now if slot in pausing else stands_at)) is not None
    ]
    return OtherWorker(worker.identity.pid, worker.hello.labels, scopes)


def _open_scope(reader: PageReader, slot: Armed, at: float) -> OpenScope | None:
    spent = reader.spent(slot, at)
    details = reader.details(slot)
    if details is None:
        return None
    return OpenScope(
        details.scope,
        spent.limit,
        max(0.0, spent.inside),
        layout.times_entered(slot.entry),
        details.pauses,
    )
