"""The worker's side of stack dumps: faulthandler, two signals and a memfd.

faulthandler writes from the signal handler itself, in C, without the GIL. So the
stacks appear even while a C call holds it. Source: Python's faulthandler module.
"""

from __future__ import annotations

import fcntl
import os

try:
    import faulthandler
except ImportError:  # an interpreter with a GIL of its own
    faulthandler = None  # type: ignore[assignment]

from hangwatch.wire import StackChannel
from hangwatch.worker.free_signals import free_signals, harmless_signal
from hangwatch.worker.own_descriptor import OwnDescriptor


class _Channel:
    """The channel of this process; there is one, however many clients it has.

    A class, so that the descriptor lasts as long as faulthandler may write to it: longer than a
    module's names.
    """

    descriptor: OwnDescriptor | None = None
    signals = (0, 0)


def open_channel() -> StackChannel | None:
    """Register the two signals, the first time; None if that is not possible."""
    if faulthandler is None:
        return None
    if _Channel.descriptor is None:
        free = free_signals()
        if len(free) < 2:
            return None
        # The first request comes to every block that is late, however little.
        own, all_threads = harmless_signal() or free[1], free[0]
        try:
            descriptor = OwnDescriptor(os.memfd_create("hangwatch-stacks", os.MFD_CLOEXEC))
            # Appending: a reader may truncate what it has read.
            fcntl.fcntl(descriptor.number, fcntl.F_SETFL, os.O_APPEND)
            faulthandler.register(own, descriptor.number, all_threads=False)
            faulthandler.register(all_threads, descriptor.number, all_threads=True)
        except (OSError, RuntimeError):
            return None
        _Channel.descriptor = descriptor
        _Channel.signals = own, all_threads
    return StackChannel(_Channel.descriptor.number, *_Channel.signals)


def forget_channel() -> None:
    """In a forked child: let go of the parent's channel."""
    descriptor, _Channel.descriptor = _Channel.descriptor, None
    if descriptor is not None:
        for number in _Channel.signals:
            faulthandler.unregister(number)
        descriptor.close()
