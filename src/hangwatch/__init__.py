"""Expiration timers for worker processes: a block that overruns is explained and ended."""

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
from hangwatch.worker.expiration import Expiration, configure, expires, paused, watch

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from hangwatch.timer.api import RequestQueue, TimerClient, TimerRequest, TimerServer
    from hangwatch.timer.file_based_local_timer import (
        FileTimerClient,
        FileTimerRequest,
        FileTimerServer,
    )
    from hangwatch.timer.local_timer import LocalTimerClient, LocalTimerServer
    from hangwatch.timer.shared_memory_timer import (
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

# Names that most workers never use: imported when they are first asked for (PEP 562).
_LAZY = {
    "FileTimerClient": "file_based_local_timer",
    "FileTimerRequest": "file_based_local_timer",
    "FileTimerServer": "file_based_local_timer",
    "LocalTimerClient": "local_timer",
    "LocalTimerServer": "local_timer",
    "RequestQueue": "api",
    "SharedMemoryTimerClient": "shared_memory_timer",
    "SharedMemoryTimerServer": "shared_memory_timer",
    "TimerClient": "api",
    "TimerRequest": "api",
    "TimerServer": "api",
    "serve": "shared_memory_timer",
}

if not TYPE_CHECKING:  # to a type checker, this would define every name

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "timer":  # else it would be there only once one of its names was used
            return import_module(f"{__name__}.timer")
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}",
                name=name,
                obj=import_module(__name__),
            )
        found = getattr(import_module(f"{__name__}.timer.{module}"), name)
        globals()[name] = found  # the next look finds it without us
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
