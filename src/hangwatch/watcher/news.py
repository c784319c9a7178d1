"""Events, made of what the watcher knows."""

from __future__ import annotations

import time

from hangwatch.watcher.events import Event
from hangwatch.watcher.verdict import Verdict
from hangwatch.watcher.watched import Watched


def coming_or_going(event: str, worker: Watched) -> Event:
    """Make a worker's ``joined`` or ``left``."""
    return {
        "event": event,
        "at": time.time(),
        "pid": worker.identity.pid,
        "labels": worker.hello.labels,
    }


def of_incident(event: str, verdict: Verdict, headline: str) -> Event:
    """Make an incident's ``expired``, or how it ended."""
    case = verdict.case
    return {
        "event": event,
        "at": time.time(),
        "pid": case.worker.pid,
        "labels": case.worker.labels,
        "scope": case.scope.name,
        "limit_s": case.scope.limit_s,
        "inside_s": round(case.scope.inside_s, 6),
        "late_s": round(case.scope.late_s, 6),
        "thread": case.scope.thread.name,
        "expiration_time": case.at - case.scope.late_s,
        "signal": verdict.chosen.signal or 0,
        "headline": headline,
    }
