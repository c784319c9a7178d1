"""What is known of a worker from its page and its hello, without asking it anything."""

from __future__ import annotations

import time
from time import monotonic

from hangwatch import page
from hangwatch.evidence import proc
from hangwatch.evidence.model import Case, OpenScope, OtherWorker, Scope, ScopeThread, Worker
from hangwatch.watch.page_reader import Armed
from hangwatch.watch.watched import Watched


def case_of(worker: Watched, slot: Armed, at: float) -> Case | None:
    """Put together what is known of a block that overran.

    Args:
        worker: whose block it is.
        slot: where it was found armed.
        at: when it was found overdue (CLOCK_MONOTONIC).

    Returns:
        The case; None if the block has ended meanwhile.
    """
    details, *enclosing = worker.reader.chain(slot)
    if not worker.reader.is_still(slot):
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
        scope=Scope(
            name=details.scope,
            limit_s=details.limit,
            inside_s=at - slot.deadline + details.limit,
            late_s=at - slot.deadline,
            entry=page.times_entered(slot.entry),
            thread=ScopeThread(details.ident, details.native_id, details.thread_name),
            enclosing=[outer.scope for outer in enclosing],
        ),
    )


def doing_of(worker: Watched) -> OtherWorker:
    """Say which blocks a worker is inside of right now."""
    now = monotonic()
    scopes = [
        OpenScope(
            details.scope,
            details.limit,
            now - slot.deadline + details.limit,
            page.times_entered(slot.entry),
        )
        for slot in worker.reader.armed()
        if slot.deadline < page.REPLACED  # the inner block stands for it
        and (details := worker.reader.details(slot)) is not None
    ]
    return OtherWorker(worker.identity.pid, worker.hello.labels, scopes)
