"""Gather the evidence of one hang. Runs in a helper process, killed after 2 s."""

from __future__ import annotations

from time import monotonic, sleep

from hangwatch.evidence import proc, stacks
from hangwatch.evidence.model import Evidence, OtherWorker, Process

_BETWEEN_READINGS_S = 0.02


def gather(asked: stacks.Asked, doomed: bool, others: list[OtherWorker]) -> Evidence:
    """Gather what can be had.

    Args:
        asked: whose stacks, and how to get them.
        doomed: whether the worker is about to be killed, so that dumping all threads
            can do no harm any more.
        others: what the other workers were doing.
    """
    pid = asked.identity.pid
    first = proc.readings(pid)
    began = monotonic()
    still = False

    def all_allowed() -> bool:
        nonlocal still
        if not doomed:
            # Two readings of its own: the first ones are from before our own dump.
            before = proc.readings(pid)
            sleep(_BETWEEN_READINGS_S)
            still = proc.stand_still(before, proc.readings(pid))
        return doomed or still

    threads, missing = stacks.collect(
        stacks.Asked(
            asked.identity,
            asked.channel,
            asked.inode,
            asked.ident,
            asked.native_id,
            asked.names,
            asked.is_overdue,
            all_allowed,
        )
    )
    sleep(max(0.0, began + _BETWEEN_READINGS_S - monotonic()))
    second = proc.readings(pid)
    between = monotonic() - began
    children = []
    try:
        children = proc.children(pid)
    except Exception as error:
        missing.append(f"children: {error}")
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
    return Evidence(threads, process, others, missing)
