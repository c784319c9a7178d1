"""Expiration timers for worker processes: a block that overruns is explained and ended."""

from hangwatch.api import Expiration, TimerClient, configure, expires
from hangwatch.errors import (
    AddressError,
    HangwatchError,
    LaunchError,
    NotConfiguredError,
    PageError,
    ProtocolError,
    WatcherUnavailableError,
)
from hangwatch.shared_memory_timer import (
    SharedMemoryTimerClient,
    SharedMemoryTimerServer,
    serve,
)

__all__ = [
    "AddressError",
    "Expiration",
    "HangwatchError",
    "LaunchError",
    "NotConfiguredError",
    "PageError",
    "ProtocolError",
    "SharedMemoryTimerClient",
    "SharedMemoryTimerServer",
    "TimerClient",
    "WatcherUnavailableError",
    "configure",
    "expires",
    "serve",
]

__version__ = "0.1.0"
