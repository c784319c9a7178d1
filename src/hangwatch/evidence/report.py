"""A report as JSON and as text. docs/report.md describes both."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from hangwatch.evidence.model import GAP, SCHEMA, Case, Outcome, Report, ThreadStack

_ENDINGS = {
    Outcome.REAPED: "killed, its death confirmed {last}",
    Outcome.RECOVERED: "{how}: {result}, at most {late} late; left alone",
    Outcome.RAISED: "TimerExpired was raised there, and has ended the block {last}",
    Outcome.REPORTED: "reported only, left alone",
    Outcome.GONE: "it died otherwise {last}",
    Outcome.UNKILLABLE: "SIGKILL has not ended it {last}; trying again",
}


def who(case: Case) -> str:
    """Name the worker: its rank if it has one, and its pid."""
    worker = case.worker
    rank = worker.labels.get("rank")
    return f"worker {worker.pid}" if rank is None else f"rank {rank} (pid {worker.pid})"


def headline(report: Report) -> str:
    """Say in one line who hung, where, for how long, against what limit, and what came of it."""
    at = report.actions[-1].at_s if report.actions else 0.0
    last = f"{at * 1000:.0f} ms after the verdict" if report.actions else ""
    late = f"{(report.case.scope.late_s + at) * 1000:.0f} ms"
    result = report.actions[-1].result if report.actions else ""
    steps = [action.action for action in report.actions[:-1] if action.result == "sent"]
    how = f"after {steps[0]}" if steps else "slow, not hung"
    ending = _ENDINGS[report.outcome].format(last=last, late=late, result=result, how=how)
    ending = ending.replace("  ", " ").replace(" ;", ";")
    return f"{overrun(report.case)}; {shown(ending.strip())}"


def overrun(case: Case) -> str:
    """Say in one line who hung, where, for how long, against what limit."""
    scope = case.scope
    where = "outside of every block" if scope.name == GAP else "inside"
    inside = f"{scope.inside_s:.3f} s {where}"
    if scope.since_renewal_s is not None:
        inside = f"{scope.since_renewal_s:.3f} s since it was renewed, {inside}"
    return shown(
        f"{who(case)} overran {'the pause ' if scope.pauses else ''}{scope.name!r}: {inside}, "
        f"limit {scope.limit_s:g} s, thread {scope.thread.name or scope.thread.native_id}"
        + (f", now in {scope.within[0]!r}" if scope.within else "")
    )


def shown(text: str) -> str:
    """Escape what would not print, or would steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def stack_lines(thread: ThreadStack) -> list[str]:
    """Show one thread's stack, innermost frame first."""
    name = thread.name or "thread"
    mark = "  <- holds the scope" if thread.holds_scope else ""
    lines = [f"{name} ({thread.id:#x}), most recent call first:{mark}"]
    if not thread.frames:
        lines.append("  (no Python frame)")
    lines += [f'  File "{f.file}", line {f.line} in {f.function}' for f in thread.frames]
    if thread.cut:
        lines.append("  ... (faulthandler shows no more)")
    return lines


def to_text(report: Report, most_threads: int | None = None) -> str:
    """Write a report for people.

    Args:
        report: the report.
        most_threads: show the stacks of at most so many threads; None for all.
    """
    case, process = report.case, report.evidence.process
    lines = [headline(report)]
    threads = report.evidence.threads
    for thread in threads[:most_threads]:
        lines += ["", *stack_lines(thread)]
    if most_threads is not None and len(threads) > most_threads:
        lines += ["", f"({len(threads) - most_threads} more threads: see the report)"]
    lines += ["", f"command: {' '.join(case.worker.command)}"]
    if case.worker.labels:
        lines.append("labels:  " + ", ".join(f"{k}={v}" for k, v in case.worker.labels.items()))
    scope = case.scope
    if scope.enclosing or scope.within:
        chain = [*scope.within, f"{scope.name} (overran)", *scope.enclosing]
        lines.append("inside:  " + " in ".join(chain))
    if report.evidence.debugger is not None:
        lines.append(f"debugger: {report.evidence.debugger}")
    if process.state is not None:
        lines.append(
            f"process: state {process.state}, wchan {process.wchan or '?'}, "
            f"CPU {process.cpu_s} s (+{process.cpu_gained_s} s in {process.between_s} s), "
            f"{len(process.tasks)} threads, {(process.rss_bytes or 0) >> 20} MiB"
        )
    lines += [
        f"child:   {child.pid} {child.state} {' '.join(child.command) or child.name}"
        for child in process.children
    ]
    for other in report.evidence.others:
        rank = other.labels.get("rank")
        name = f"pid {other.pid}" if rank is None else f"rank {rank} (pid {other.pid})"
        doing = ", ".join(
            f"{'the pause ' if scope.pauses else ''}{scope.name!r} "
            f"for {scope.inside_s:.3f} of {scope.limit_s:g} s"
            for scope in sorted(other.scopes, key=lambda scope: not scope.pauses)
        )
        lines.append(f"other:   {name} in {doing or 'no scope'}")
    lines += [
        f"action:  +{action.at_s * 1000:.0f} ms {action.action}: {action.result}"
        for action in report.actions
    ]
    lines += [f"missing: {reason}" for reason in report.evidence.missing]
    return "\n".join(map(shown, lines)) + "\n"


def facts(report: Report, place: str | None) -> dict[str, object]:
    """Return what a structured log wants to know; `place` is the report's folder, if any."""
    worker, scope = report.case.worker, report.case.scope
    return {
        "outcome": report.outcome.value,
        "pid": worker.pid,
        "labels": worker.labels,
        "scope": scope.name,
        "limit_s": scope.limit_s,
        "inside_s": scope.inside_s,
        "late_s": scope.late_s,
        "thread": scope.thread.name,
        "report": place,
    }


def to_json(report: Report) -> str:
    """Write a report for programs, as schema `SCHEMA`."""
    case = report.case
    return (
        json.dumps(
            {
                "schema": SCHEMA,
                "outcome": report.outcome,
                "headline": headline(report),
                "at": datetime.fromtimestamp(case.at, UTC).isoformat(timespec="milliseconds"),
                "worker": asdict(case.worker),
                "scope": asdict(case.scope),
                **asdict(report.evidence),
                "actions": [asdict(action) for action in report.actions],
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )
