"""Gather the evidence of one hang. Runs in a helper process, killed if it takes too long."""

from __future__ import annotations

from time import monotonic, sleep

from hangwatch.evidence import debuggers, proc, stacks
from hangwatch.evidence.model import Evidence, OtherWorker, Process
from hangwatch.failpoints import failpoint


def gather(asked: stacks.Asked, others: list[OtherWorker]) -> Evidence:
    """Gather what can be had of a worker that is overdue.

    Args:
        asked: whose stacks, and how to get them.
        others: what the other workers were doing.
    """
    failpoint("evidence.gathering")
    pid = asked.identity.pid
    began = monotonic()
    first = proc.readings(pid)
    debugger = debuggers.tracing(pid)
    if debugger is None:
        threads, missing = stacks.collect(asked)
        debugger = debuggers.in_stacks(threads) or asked.debugger
    else:
        # Signals of a traced process stop at its tracer.
        threads, missing = [], [f"Python stacks: {debugger}, and would see the request"]
    sleep(max(0.0, began + proc.BETWEEN_READINGS_S - monotonic()))
    second = proc.readings(pid)
    between = monotonic() - began
    children, problem = proc.children(pid)
    if problem is not None:
        missing.append(f"children: {problem}")
    tasks = proc.tasks(pid, first, second)
    if not tasks:
        missing.append("process: it is gone, or /proc does not show it")
    main = next((task for task in tasks if task.tid == pid), None)
    if main is not None and main.wchan is None:
        missing.append("wchan: this kernel does not tell, or it runs")
    process = Process(
        state=None if main is None else main.state,
        wchan=None if main is None else main.wchan,
        cpu_s=round(sum(task.cpu_s for task in tasks), 3) if tasks else None,
        cpu_gained_s=round(sum(task.cpu_gained_s for task in tasks), 3) if tasks else None,
        between_s=round(between, 3),
        rss_bytes=proc.rss_bytes(pid),
        children=children,
        tasks=tasks,
    )
    return Evidence(threads, process, others, missing, debugger)
