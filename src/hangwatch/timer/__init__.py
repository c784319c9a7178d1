"""The names of ``torch.distributed.elastic.timer``, without torch: drop-in replacements.

Usage:

    import hangwatch.timer as timer

    queue = multiprocessing.get_context("spawn").Queue()
    server = timer.LocalTimerServer(queue)  # in the launcher
    server.start()

    timer.configure(timer.LocalTimerClient(queue))  # in each worker
    with timer.expires(after=60):
        ...

`api` has the contract, `local_timer` the pair over a queue, `file_based_local_timer` the pair
over a FIFO. `shared_memory_timer` has hangwatch's own pair, which torch does not have.
"""

from hangwatch.timer.api import (
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    expires,
)
from hangwatch.timer.file_based_local_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
)
from hangwatch.timer.local_timer import LocalTimerClient, LocalTimerServer

__all__ = [
    "FileTimerClient",
    "FileTimerRequest",
    "FileTimerServer",
    "LocalTimerClient",
    "LocalTimerServer",
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "expires",
]
