"""Expiration timers for worker processes: a block that overruns is explained and ended."""

from hangwatch.api import (
    Expiration,
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    expires,
    paused,
    watch,
)
from hangwatch.errors import (
    AddressError,
    HangwatchError,
    LaunchError,
    NotConfiguredError,
    PageError,
    ProtocolError,
    TimerExpired,
    UnsupportedError,
    VersionError,
    WatcherUnavailableError,
)
from hangwatch.file_based_local_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
)
from hangwatch.local_timer import LocalTimerClient, LocalTimerServer
from hangwatch.shared_memory_timer import (
    SharedMemoryTimerClient,
    SharedMemoryTimerServer,
    serve,
)

__all__ = [
    "AddressError",
    "Expiration",
    "FileTimerClient",
    "FileTimerRequest",
    "FileTimerServer",
    "HangwatchError",
    "LaunchError",
    "LocalTimerClient",
    "LocalTimerServer",
    "NotConfiguredError",
    "PageError",
    "ProtocolError",
    "RequestQueue",
    "SharedMemoryTimerClient",
    "SharedMemoryTimerServer",
    "TimerClient",
    "TimerExpired",
    "TimerRequest",
    "TimerServer",
    "UnsupportedError",
    "VersionError",
    "WatcherUnavailableError",
    "configure",
    "expires",
    "paused",
    "serve",
    "watch",
]

__version__ = "0.1.0"
